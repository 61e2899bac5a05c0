"""The nouns of the compiler: frozen values that the passes hand to each other."""

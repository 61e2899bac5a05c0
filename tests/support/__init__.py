"""What the tests share: the oracle, the cases, random models and marks."""

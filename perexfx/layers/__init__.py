"""Layer rules: one file per kind of site.

Adding one is one file here, one entry in `RULES`, and a case in tests/support/cases.py; the tests of exactness run over
the table. Open `prelu.py` first, a small whole one; what a rule is, `perexfx.Rule`, is in ir/rule.py.
"""

from perexfx.ir.rule import Rule
from perexfx.layers.batch_norm import FrozenBatchNorm
from perexfx.layers.bilinear import Bilinear
from perexfx.layers.contraction import CONTRACTIONS
from perexfx.layers.convolution import CONVOLUTIONS
from perexfx.layers.elementwise import Elementwise
from perexfx.layers.embedding import Embedding
from perexfx.layers.embedding_bag import EmbeddingBag
from perexfx.layers.expand import Expand
from perexfx.layers.fallback import Fallback
from perexfx.layers.group_norm import GroupNorm, InstanceNorm
from perexfx.layers.gru import GRU
from perexfx.layers.layer_norm import LayerNorm, RMSNorm
from perexfx.layers.linear import Linear
from perexfx.layers.lstm import LSTM
from perexfx.layers.prelu import PReLU
from perexfx.layers.recurrent import RNN
from perexfx.layers.transposed_convolution import TRANSPOSED_CONVOLUTIONS

RULES: tuple[Rule, ...] = (
    Linear(),
    *CONVOLUTIONS,
    *TRANSPOSED_CONVOLUTIONS,
    Bilinear(),
    Embedding(),
    EmbeddingBag(),
    LSTM(),
    GRU(),
    RNN(),
    LayerNorm(),
    RMSNorm(),
    GroupNorm(),
    InstanceNorm(),
    FrozenBatchNorm(),
    Elementwise(),
    PReLU(),
    Expand(),
    *CONTRACTIONS,
)

__all__ = ["RULES", "Fallback"]

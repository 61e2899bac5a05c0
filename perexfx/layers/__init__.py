"""Layer rules: one file per kind of site.

Adding one is one file here and one entry in `RULES`; the tests of exactness run over the table.
"""

from perexfx.ir.rule import Rule
from perexfx.layers.batch_norm import FrozenBatchNorm
from perexfx.layers.convolution import CONVOLUTIONS
from perexfx.layers.elementwise import Elementwise
from perexfx.layers.embedding import Embedding
from perexfx.layers.expand import Expand
from perexfx.layers.group_norm import GroupNorm, InstanceNorm
from perexfx.layers.layer_norm import LayerNorm, RMSNorm
from perexfx.layers.linear import Linear

RULES: tuple[Rule, ...] = (
    Linear(),
    *CONVOLUTIONS,
    Embedding(),
    LayerNorm(),
    RMSNorm(),
    GroupNorm(),
    InstanceNorm(),
    FrozenBatchNorm(),
    Elementwise(),
    Expand(),
)

__all__ = ["RULES"]

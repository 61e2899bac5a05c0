"""The table: from the names of aten operations to the rules about the example axis.

Promises: a name covers every overload, its in-place form (`add_`) and its copying form (`view_copy`). Operations that
torch marks as pointwise need no entry. Names that a release of torch does not have do no harm.
"""

from __future__ import annotations

from perexfx.analysis.axes import along, elementwise, indexing, moves, products
from perexfx.analysis.axes.call import AxisRule, Mixing, Unknown, refused

_MOVES: dict[AxisRule, str] = {
    moves.viewed: "view",
    moves.moved: "_unsafe_view _reshape_alias _reshape_copy unsqueeze squeeze permute transpose t expand alias stack "
    "cat repeat constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle diag_embed "
    "rot90",
    moves.cut(("start", "end")): "slice slice_scatter",
    moves.cut(("split_size",)): "split unsafe_split",
    moves.cut(("split_sizes",)): "split_with_sizes unsafe_split_with_sizes",
    moves.moved_off_axis("dim", "it takes the examples apart"): "unbind",
    moves.moved_off_axis("dim", "it picks one example by its position"): "select select_scatter",
    moves.moved_off_axis("dims", "it moves examples to the places of others"): "flip roll",
    moves.moved_off_axis("dimension", "it takes windows of several examples"): "unfold",
    moves.diagonal: "diagonal",
    moves.diagonal_written: "diagonal_scatter",
    moves.strided: "as_strided",
}


_ELEMENTWISE: dict[AxisRule, str] = {
    elementwise.pointwise: "hardswish hardsigmoid mish log_sigmoid_forward floor_divide rrelu_with_noise "
    "where masked_fill copy _conj _neg_view fill zero addcmul addcdiv lerp complex polar _prelu_kernel "
    "bernoulli normal uniform random exponential log_normal geometric cauchy",
    elementwise.loss: "mse_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss "
    "binary_cross_entropy_with_logits",
    elementwise.class_loss: "nll_loss_forward nll_loss2d_forward multi_margin_loss multilabel_margin_loss_forward",
    elementwise.like_first: "view_as_real clone detach lift_fresh _to_copy native_dropout _fused_dropout zeros_like "
    "ones_like full_like empty_like rand_like randn_like randint_like",
    elementwise.no_examples: "new_zeros new_ones new_full new_empty new_empty_strided",
    elementwise.against_all("elements", "test_elements", "it compares each example with all others"): "isin",
}


_ALONG: dict[AxisRule, str] = {
    along.reduce: "sum nansum mean amax amin prod var std var_mean std_mean logsumexp norm linalg_vector_norm any all "
    "argmax argmin max min median nanmedian mode kthvalue aminmax count_nonzero trace _is_all_true _is_any_true",
    along.along(): "_softmax _safe_softmax _log_softmax cumsum cumprod _cumsum _cumprod logcumsumexp _logcumsumexp "
    "cummax cummin sort topk glu _fft_r2c _fft_c2r _fft_c2c multinomial",
    along.across: "linalg_cross",
    along.slices_along: "renorm",
    along.norm_over(along.normalized_axes): "native_layer_norm _fused_rms_norm",
    along.norm_over(along.all_but_first): "native_group_norm",
    along.batch_norm(): "native_batch_norm _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm",
    along.batch_norm(training=False): "_native_batch_norm_legit_no_training _batch_norm_no_update",
    along.batch_norm(training=True): "_batch_norm_with_update",
    along.on_last(1): "view_as_complex reflection_pad1d replication_pad1d avg_pool1d adaptive_max_pool1d "
    "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d",
    along.on_last(2): "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d reflection_pad2d "
    "replication_pad2d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa fractional_max_pool2d max_unpool2d triu tril",
    along.on_last(3): "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d reflection_pad3d "
    "replication_pad3d upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d fractional_max_pool3d "
    "max_unpool3d",
    along.columns: "im2col",
    along.from_columns: "col2im",
    along.sampled: "grid_sampler_2d grid_sampler_3d cudnn_grid_sampler",
    along.batch_only: "affine_grid_generator",
}


_PRODUCTS: dict[AxisRule, str] = {
    products.product(("self", (0, None)), ("mat2", (None, 1))): "mm",
    products.product(("mat1", (0, None)), ("mat2", (None, 1)), bias="self"): "addmm _addmm_activation",
    products.product(("self", (0, 1, None)), ("mat2", (0, None, 2))): "bmm",
    products.product(("batch1", (0, 1, None)), ("batch2", (0, None, 2)), bias="self"): "baddbmm",
    products.product(("batch1", (None, 0, None)), ("batch2", (None, None, 1)), bias="self"): "addbmm",
    products.product(("self", (0, None)), ("vec", (None,))): "mv",
    products.product(("mat", (0, None)), ("vec", (None,)), bias="self"): "addmv",
    products.product(("vec1", (0,)), ("vec2", (1,)), bias="self"): "addr",
    products.product(("self", (None,)), ("tensor", (None,))): "dot",
    products.product(("self", (None,)), ("other", (None,))): "vdot",
    products.distances: "_cdist_forward _euclidean_dist",
    products.trilinear: "_trilinear",
    products.convolution(): "convolution",
    products.convolution(batch_axis=1): "conv_tbc",
    products.attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_fused_attention_overrideable",
    products.matrices(): "_linalg_det _linalg_slogdet linalg_inv_ex linalg_cholesky_ex linalg_qr _linalg_svd "
    "_linalg_eigh linalg_eig linalg_eigvals _linalg_eigvals linalg_matrix_exp linalg_pinv linalg_lu "
    "linalg_lu_factor_ex linalg_ldl_factor_ex linalg_solve_triangular triangular_solve cholesky_solve "
    "cholesky_inverse geqrf",
    products.matrices("tau"): "linalg_householder_product",
    products.matrices("input2"): "ormqr",
    products.matrices("pivots"): "linalg_lu_solve linalg_ldl_solve",
    products.matrices("LU_pivots"): "lu_unpack",
    products.solution: "_linalg_solve_ex",
    products.recurrent_layer: "mkldnn_rnn_layer",
    products.recurrent_network: "_cudnn_rnn",
    products.recurrent_cell: "_thnn_fused_lstm_cell _thnn_fused_gru_cell",
}


_INDEXING: dict[AxisRule, str] = {
    indexing.index: "index _unsafe_index",
    indexing.index_put: "index_put _unsafe_index_put",
    indexing.look_up: "embedding",
    indexing.bag: "_embedding_bag _embedding_bag_forward_only",
    indexing.take: "take",
    indexing.gather: "gather scatter scatter_add scatter_reduce",
    indexing.along_constant_positions: "index_select index_add index_copy index_fill index_reduce",
    indexing.sorted_into("self", "sorted_sequence"): "searchsorted",
    indexing.sorted_into("self", "boundaries"): "bucketize",
}


_REFUSED: dict[AxisRule, str] = {
    refused(Mixing, "it compares every row with every other"): "_pdist_forward",
    refused(Mixing, "it counts over all entries"): "histc histogram",
    refused(Mixing, "it hands out its source in the order of all entries"): "masked_scatter put",
    refused(Mixing, "it joins rows into segments by their position"): "segment_reduce",
    refused(Unknown, "it rescales rows of a table that all examples read"): "embedding_renorm",
    refused(Unknown, "it changes in place what a value is; use what the operation without `_` returns"): "resize_ set_ "
    "as_strided_ detach_",
}


RULES: dict[str, AxisRule] = {
    name: rule
    for part in (_MOVES, _ELEMENTWISE, _ALONG, _PRODUCTS, _INDEXING, _REFUSED)
    for rule, names in part.items()
    for name in names.split()
}


OWN_RULES: dict[str, AxisRule] = {"recurrent_layer": products.own_recurrent_layer}
"""perexfx's own operations."""

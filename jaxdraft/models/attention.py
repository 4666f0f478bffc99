"""Causal attention over whole rows, by the kernel that the platform has for it.

What XLA compiles of the formula keeps a score for every query, key and head: 4·B·N·T² bytes forward and again backward,
4 GiB for eight rows of 2048 tokens and 32 heads. Flash kernels (Dao, arXiv 2307.08691) keep a block at a time:

- TPU: splash attention, which knows segments, windows and grouped heads, and skips blocks that nothing sees.
- GPU: cuDNN's, where it can be had: see ``_cudnn``.
- CPU, and wherever these do not apply: the formula, ``attend``.

A kernel changes the order of sums and nothing else; tests/models/test_attention.py derives by how much that can differ.

Shapes: B batch, T tokens, S keys of the same row, N query heads, K key/value heads, H head size.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdraft.backend import platform
from jaxdraft.sharding import spec

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, int | None], jax.Array]

# Both kernels read blocks of this many keys. A row is filled up to a multiple; one shorter than that is left to XLA.
_LANES = 128


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention, ``[B, T, N, H]``, of rows that hold all their keys; softmax is float32.

    Differentiable. Padding is a segment like any other: what comes out there means nothing, and is finite.

    Args:
      q_BTNH: queries.
      k_BTKH: keys; N / K query heads share one.
      v_BTKH: values.
      segment_ids_BT: tokens attend only within their own segment; ``None`` is one segment.
      window: tokens that a token sees, itself included; ``None`` is all before it.
    """
    attend = _kernel(q_BTNH, segment_ids_BT)
    if attend is None:
        return plain(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
    length = q_BTNH.shape[1]
    window = None if window is None or window >= length else window
    # Filler stands behind the row, where no token of the row looks.
    filled = lambda x: jnp.pad(x, [(0, 0), (0, -length % _LANES), *[(0, 0)] * (x.ndim - 2)])
    segment_ids_BT = None if segment_ids_BT is None else filled(segment_ids_BT)
    return on_devices(attend, filled(q_BTNH), filled(k_BTKH), filled(v_BTKH), segment_ids_BT, window)[:, :length]


def plain(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=None, window=None) -> jax.Array:
    """``attention`` as its formula says, with every score of a layer in memory, forward and again backward."""
    mask_BTS = causal_mask(q_BTNH.shape[:2], segment_ids_BT, window)
    return jax.checkpoint(attend, prevent_cse=False)(q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), mask_BTS)


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention over the cache as it lies, ``[B, T, N, H]``: no step copies or transposes the cache.

    Scores and softmax are float32. Every query needs at least one slot that its mask allows.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    # One matrix per key/value head, M = N / K · T rows: XLA's CPU compiler turns only this form into fast products.
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores_BKMS = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKMS.reshape(B, K, -1, T, S), -jnp.inf)
    probs_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype).reshape(B, K, -1, S)
    out_BKMH = jnp.einsum("bkms,bksh->bkmh", probs_BKMS, v_BKSH)
    return out_BKMH.reshape(B, K, -1, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=None, window=None) -> jax.Array:
    """``attention`` by Pallas' splash kernel, for T a multiple of 128 and the rows of one device.

    Any head size, grouped heads without a copy of their keys. Blocks of 512 queries and keys where those divide T, as
    MaxText sets them; other sizes were not timed. The kernel does not scale scores: queries are scaled, and rounded
    once more to their dtype, by at most 2⁻⁹ of themselves in bfloat16. Interpreted, slowly, on anything but a TPU.
    """
    # Imported here: only TPUs need it, and it takes a while.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        LocalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    _, T, N, H = q_BTNH.shape
    block = next(size for size in (512, 384, 256, 128) if T % size == 0)
    mask_TS = CausalMask((T, T)) if window is None else LocalMask((T, T), (window - 1, 0), 0)
    kernel = make_splash_mha(
        MultiHeadMask([mask_TS] * N),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    rows = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    segment_ids = None if segment_ids_BT is None else SegmentIds(segment_ids_BT, segment_ids_BT)
    return jnp.swapaxes(jax.vmap(kernel)(*rows, segment_ids), 1, 2)


def on_devices(attend: Attend, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window: int | None) -> jax.Array:
    """``attend`` on every device of the mesh in use, over its own rows and heads: XLA cannot cut a kernel itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
    group = q_BTNH.shape[2] // k_BTKH.shape[2]
    q_spec = spec(mesh, ("batch", None, "heads", None), q_BTNH.shape)
    kv_spec = spec(mesh, ("batch", None, "kv_heads", None), k_BTKH.shape)
    ids_spec = spec(mesh, ("batch", None), q_BTNH.shape[:2])

    def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        if q_spec[2] != kv_spec[2]:
            # Too few key/value heads to cut: each device has them all, and takes those of its query heads.
            count = q_BTNH.shape[2]
            shared = math.gcd(count, group)
            heads = (jax.lax.axis_index(q_spec[2]) * count + jnp.arange(0, count, shared)) // group
            k_BTKH, v_BTKH = jnp.take(k_BTKH, heads, axis=2), jnp.take(v_BTKH, heads, axis=2)
        return attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)

    specs = (q_spec, kv_spec, kv_spec, ids_spec)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, segment_ids_BT
    )


def causal_mask(shape: tuple[int, ...], segment_ids_BT: jax.Array | None, window: int | None) -> jax.Array:
    """``[B, T, S]``: whether a query sees a key of its row: not after it, in its segment, and within the window."""
    order_T = jnp.arange(shape[1])
    seen_1TS = seen(order_T[:, None], order_T, window)[None]
    if segment_ids_BT is None:
        return jnp.broadcast_to(seen_1TS, (shape[0], *seen_1TS.shape[1:]))
    return seen_1TS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def seen(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """Whether a query at one place sees a key at another: not after it, and fewer than ``window`` places before."""
    causal = key <= query
    return causal if window is None else causal & (key > query - window)


def _kernel(q_BTNH: jax.Array, segment_ids_BT: jax.Array | None) -> Attend | None:
    """The kernel for the program being traced; ``None`` is the formula.

    A kernel has to be told how it is cut: a program for several devices needs the mesh of ``jax.set_mesh``.
    """
    cut_unknown = jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1
    if q_BTNH.shape[1] < _LANES or cut_unknown:
        return None
    if platform() == "tpu":
        return splash
    return _cudnn if platform() == "gpu" and _has_cudnn(q_BTNH, segment_ids_BT is not None) else None


def _has_cudnn(q_BTNH: jax.Array, segments: bool) -> bool:
    """Whether ``_cudnn`` is for these rows: 16 bits, heads of at most 128 in steps of 8, an NVIDIA GPU from Ampere on.

    Rows of segments need jax 0.12: before, the kernel wrote a gradient of the mask, of ``[B, N, T, S]``, that nobody
    asked for (jax issue 34685).
    """
    H = q_BTNH.shape[-1]
    # "9.0" on a GPU of NVIDIA, "gfx90a" on one of AMD, missing on a device that programs are only compiled for.
    major = getattr(jax.local_devices()[0], "compute_capability", "").partition(".")[0]
    return (
        q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        and H <= 128
        and H % 8 == 0
        and major.isdigit()
        and int(major) >= 8
        and (not segments or jax.__version_info__ >= (0, 12))
    )


def _cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window) -> jax.Array:
    """``attention`` by cuDNN's flash kernel, for T a multiple of 128 and the rows of one device.

    Never run: no GPU was at hand. What is tested is that the formula gives the same for these very arguments.

    Rows of one segment need no mask. Packed rows do: cuDNN can be told where segments begin, but not through JAX's
    public interface (jax pull request 29731), so they get a mask, which JAX hands over as a bias of ``[B, 1, T, S]``,
    2·B·T² bytes: an N-th of the scores, not nothing. A window goes into the mask, as cuDNN before 9.10.2 takes no
    window beside a bias. T is a multiple of 128, as cuDNN's backward pass gave NaN beside a mask when half of its last
    128 keys were missing (pytorch issue 196678).
    """
    if segment_ids_BT is None:
        windows = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=windows, implementation="cudnn"
        )
    mask_BTS = causal_mask(q_BTNH.shape[:2], segment_ids_BT, window)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_BTS[:, None], is_causal=True, implementation="cudnn"
    )

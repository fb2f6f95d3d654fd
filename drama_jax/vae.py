"""The discrete variational autoencoder: frame -> K categoricals of C classes -> frame (paper section 2.1).

Convolutions are 5x5 with batch normalisation and SiLU; the first has stride 1, every other one stride 2, and the
decoder mirrors the encoder. Activations between layers stay in phase layout (see `drama_jax.nn.convolution`) wherever
the next layer wants it. Shapes: N frames, E embedding size, K categoricals, C classes, S = K * C.

In training mode batch normalisation uses the statistics of the N frames and returns moved running statistics; in
evaluation mode it is folded into the kernels.

Where the configuration says that observations are vectors, `drama_jax.vector_autoencoder` takes the place of the
convolutions.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from drama_jax import checks, distributions
from drama_jax.config import AutoencoderConfig
from drama_jax.nn import (
    BatchNorm,
    conv3x3,
    depth_to_space,
    gpu_convolution,
    space_to_depth,
    stencil_stride1,
    stencil_stride2,
    stencil_transpose_stride1,
    stencil_transpose_stride2,
)
from drama_jax.nn.batch_norm import Layout, across, rearrange
from drama_jax.precision import at_least_float32, widen
from drama_jax.vector_autoencoder import VectorDecoder, VectorEncoder, weight_init

Params = Any
Dtype = Any

STENCILS = {"stride1": stencil_stride1, "stride2": stencil_stride2, "transpose2": stencil_transpose_stride2}
PHASES_IN = {"stride1": 4, "stride2": 4, "transpose2": 1}
PHASES_OUT = {"stride1": 4, "stride2": 1, "transpose2": 4}


def torch_linear_init(fan_in: int) -> nn.initializers.Initializer:
    """U(+-1/sqrt(fan_in)), PyTorch's default for a linear layer's weight and bias."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ConvBlock(nn.Module):
    """5x5 convolution, batch normalisation, SiLU; input and output in the layout its kind asks for.

    The kernels of a GPU read and write phases at no cost, while sums over what another layout holds are slow there:
    between two layers the phases then lie as the one lays and the other reads them, and batch norm works on them. On a
    CPU it is sums over phases that are slow, so batch norm works on what the convolution wrote and rearranges last.

    Attributes:
      features: channels of the output.
      kind: of convolution.
      dtype: compute dtype.
      from_phases: the input is in phase layout although the kind asks for pixels.
    """

    features: int
    kind: Literal["stride1", "stride2", "transpose2"]
    dtype: Dtype
    from_phases: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, layout: Layout = "same") -> jax.Array:
        """[N, h, w, ..] -> [N, h, w, ..] of `dtype`, rearranged to the `layout` that the next layer reads."""
        params = at_least_float32(self.dtype)
        channels = x.shape[-1] // (4 if self.from_phases else PHASES_IN[self.kind])
        kernel = self.param("kernel", weight_init, (5, 5, channels, self.features), params)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), params)
        early = train and layout == "phases" and gpu_convolution.available()
        phases = 4 if early else PHASES_OUT[self.kind]
        norm = BatchNorm(self.features, phases, param_dtype=params, name="norm")
        stencil = STENCILS[self.kind]
        if train:
            taps = stencil(kernel.astype(self.dtype))
            if self.kind == "stride1" and layout == "same":
                return norm.train_first_silu(x, taps, bias)
            y = conv3x3(x, taps, from_phases=self.from_phases, to_phases=early)
            return norm.train_silu(y, bias, "same" if early else layout)
        scale, shift = norm.folded(bias)
        folded = stencil((kernel * scale).astype(self.dtype))
        (term,) = across(PHASES_OUT[self.kind], shift)
        return conv_silu(depth_to_space(x) if self.from_phases else x, folded, term, layout)


def conv_silu(x: jax.Array, kernel: jax.Array, bias: jax.Array, layout: Layout) -> jax.Array:
    """SiLU(3x3 convolution + bias) in the dtype of `x`: the fused kernel where there is one, else XLA."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % 16)))
    if gpu_convolution.available() and gpu_convolution.serves(padded, kernel.shape[-1]) and layout != "pixels":
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, -x.shape[-1] % 16), (0, 0)))
        return gpu_convolution.conv3x3(
            padded, kernel, bias, silu=True, to_phases=layout == "phases", name="conv3x3_silu"
        )
    y = nn.silu(conv3x3(x, kernel).astype(bias.dtype) + bias).astype(x.dtype)
    return rearrange(y, layout)


class Encoder(nn.Module):
    """Frames [N, height, width, channels] in phase layout [N, h/2, w/2, 4 channels], 0..1, to features [N, E]."""

    config: AutoencoderConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, phases: jax.Array, train: bool) -> jax.Array:
        first, *rest = self.config.depths
        x = ConvBlock(first, "stride1", self.dtype, name="conv_0")(phases, train)
        for i, depth in enumerate(rest, 1):
            block = ConvBlock(depth, "stride2", self.dtype, name=f"conv_{i}")
            x = block(x, train, "phases" if i < len(rest) else "same")
        return x.reshape(x.shape[0], -1)


class Decoder(nn.Module):
    """Latents [N, S] to frames in phase layout [N, h/2, w/2, 4 channels], 0..1, in at least float32."""

    config: AutoencoderConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, latent: jax.Array, train: bool) -> jax.Array:
        params = at_least_float32(self.dtype)
        size, depths = self.config.map_size, self.config.depths[::-1]
        linear = nn.Dense(
            size * size * depths[0], dtype=self.dtype, param_dtype=params, kernel_init=weight_init, name="linear"
        )
        x = linear(latent.astype(self.dtype)).reshape(-1, size, size, depths[0])
        norm = BatchNorm(depths[0], param_dtype=params, name="norm")
        zero = jnp.zeros((depths[0],), params)
        if train:
            x = norm.train_silu(x, zero)
        else:
            scale, shift = across(1, *norm.folded(zero))
            x = nn.silu(x.astype(params) * scale + shift).astype(self.dtype)
        late = gpu_convolution.available()
        for i, depth in enumerate(depths[1:]):
            block = ConvBlock(depth, "transpose2", self.dtype, from_phases=late and i > 0, name=f"conv_{i}")
            x = block(x, train, "pixels" if i + 2 < len(depths) and not late else "same")
        channels = self.config.image_channels
        kernel = self.param("kernel", weight_init, (5, 5, depths[-1], channels), params)
        bias = self.param("bias", nn.initializers.zeros, (channels,), params)
        taps = stencil_transpose_stride1(kernel.astype(self.dtype))
        if self.dtype == jnp.bfloat16:
            # With the channels that the convolution adds anyway, their gradient is written with them, not copied.
            taps = jnp.pad(taps, ((0, 0), (0, 0), (0, 0), (0, -taps.shape[-1] % 16)))
        return biased_sigmoid(conv3x3(x, taps), bias, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def biased_sigmoid(y: jax.Array, bias: jax.Array, phases: int) -> jax.Array:
    """sigmoid(y + bias) of every phase, in the dtype of `bias`: [N, h, w, phases * C or more] -> [N, h, w, phases * C].

    Channels of y beyond those of the result are dropped.
    """
    return nn.sigmoid(y[..., : phases * bias.shape[0]].astype(bias.dtype) + jnp.tile(bias, phases))


def _biased_sigmoid_backward(
    phases: int, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y, bias = saved
    frames = biased_sigmoid(y, bias, phases)
    inner = (gradient * frames * (1 - frames)).astype(y.dtype)
    inner = jnp.pad(inner, ((0, 0),) * (y.ndim - 1) + ((0, y.shape[-1] - inner.shape[-1]),))
    # Written once, in the dtype of `y`, for the gradients of convolution and bias: left to XLA, both work it out from
    # the gradient by the frames, which is of float32.
    inner = jax.lax.optimization_barrier(inner)
    # Whole lines first, then their cells: a sum straight to so few channels runs at a fifth of the bandwidth.
    lines = jax.lax.optimization_barrier(inner.astype(bias.dtype).sum(axis=(0, 1)))
    by_phase = lines[:, : gradient.shape[-1]].reshape(-1, bias.shape[0])
    return inner, by_phase.sum(axis=0)


def _biased_sigmoid_forward(
    y: jax.Array, bias: jax.Array, phases: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return biased_sigmoid(y, bias, phases), (y, bias)


biased_sigmoid.defvjp(_biased_sigmoid_forward, _biased_sigmoid_backward)


def posterior_head(config: AutoencoderConfig, dtype: Dtype) -> nn.Dense:
    """Linear map from the embedding [.., E] to raw posterior logits [.., S]."""
    return latent_head(config.embedding_size, config, dtype)


def latent_head(fan_in: int, config: AutoencoderConfig, dtype: Dtype) -> nn.Dense:
    """Linear map from `fan_in` features to raw logits [.., S], with PyTorch's default initialisation."""
    init = torch_linear_init(fan_in)
    return nn.Dense(
        config.latent_size, dtype=dtype, param_dtype=at_least_float32(dtype), kernel_init=init, bias_init=init
    )


def mixed_logits(config: AutoencoderConfig, raw: jax.Array) -> jax.Array:
    """Raw logits [.., S] to log-probabilities [.., K, C] with the uniform share mixed in, in at least float32."""
    logits = raw.reshape(*raw.shape[:-1], config.categoricals, config.classes)
    return distributions.unimix(widen(logits), config.unimix)


def init(key: jax.Array, config: AutoencoderConfig, dtype: Dtype = jnp.float32) -> tuple[Params, Params]:
    """Parameters and batch statistics: two dicts, `{encoder, posterior_head, decoder}` and `{encoder, decoder}`."""
    checks.instances("vae.init", config=(config, AutoencoderConfig))
    checks.key("vae.init", key)
    encoder_key, head_key, decoder_key = jax.random.split(key, 3)
    inputs = jnp.zeros((1, *_input_shape(config)), dtype)
    embedding = jnp.zeros((1, config.embedding_size), dtype)
    latent = jnp.zeros((1, config.latent_size), dtype)
    encoder = _encoder(config, dtype).init(encoder_key, inputs, True)
    decoder = _decoder(config, dtype).init(decoder_key, latent, True)
    head = posterior_head(config, dtype).init(head_key, embedding)
    params = {"encoder": encoder["params"], "posterior_head": head["params"], "decoder": decoder["params"]}
    return params, {"encoder": encoder.get("batch_stats", {}), "decoder": decoder.get("batch_stats", {})}


def _encoder(config: AutoencoderConfig, dtype: Dtype) -> nn.Module:
    return VectorEncoder(config, dtype) if config.vector_size else Encoder(config, dtype)


def _decoder(config: AutoencoderConfig, dtype: Dtype) -> nn.Module:
    return VectorDecoder(config, dtype) if config.vector_size else Decoder(config, dtype)


def _input_shape(config: AutoencoderConfig) -> tuple[int, ...]:
    """Of one frame as the encoder takes it."""
    half = config.image_size // 2
    return config.frame_shape if config.vector_size else (half, half, 4 * config.image_channels)


def to_inputs(config: AutoencoderConfig, frames: jax.Array, dtype: Dtype) -> jax.Array:
    """Frames as the encoder takes them and the decoder returns them.

    Args:
      config: which frames.
      frames: images uint8 [N, height, width, channels], or vectors float32 [N, entries].
      dtype: of the result.

    Returns:
      Phases in 0..1 [N, h/2, w/2, 4 channels], or symlog values [N, entries].
    """
    checks.instances("vae.to_inputs", config=(config, AutoencoderConfig))
    checks.arrays("vae.to_inputs", frames=(frames, ("N", *config.frame_shape), config.frame_dtype))
    return distributions.symlog(frames).astype(dtype) if config.vector_size else frames_to_phases(frames, dtype)


def to_frames(config: AutoencoderConfig, outputs: jax.Array) -> jax.Array:
    """What the decoder returned as images in 0..1 [N, height, width, channels], or vectors [N, entries]."""
    checks.instances("vae.to_frames", config=(config, AutoencoderConfig))
    checks.arrays("vae.to_frames", outputs=(outputs, ("N", *_input_shape(config)), "float"))
    return distributions.symexp(outputs) if config.vector_size else depth_to_space(outputs)


def frames_to_phases(frames: jax.Array, dtype: Dtype) -> jax.Array:
    """Frames uint8 [N, height, width, channels] to phases in 0..1 [N, h/2, w/2, 4 channels] of `dtype`."""
    checks.arrays("vae.frames_to_phases", frames=(frames, ("N", "height", "width", "channels"), "uint8"))
    # Divided in float32: on a GPU, XLA multiplies by the reciprocal instead, which in bfloat16 is 1 / 254.
    return (space_to_depth(frames).astype(at_least_float32(dtype)) / 255).astype(dtype)


def encode(
    config: AutoencoderConfig, params: Params, batch_stats: Params, phases: jax.Array, *, train: bool, dtype: Dtype
) -> tuple[jax.Array, Params]:
    """Features of frames.

    Args:
      params: as returned by `init`.
      batch_stats: as returned by `init`.
      phases: frames in phase layout, or symlog vectors, see `to_inputs`.
      train: whether to normalise by the statistics of this batch, and move the running ones.
      dtype: compute dtype of the convolutions.

    Returns:
      Embedding [N, E] of `dtype` (flattened height, width, channel) and the batch statistics, moved if `train`.
    """
    checks.instances("vae.encode", config=(config, AutoencoderConfig))
    checks.parts("vae.encode", "params", params, "encoder")
    checks.parts("vae.encode", "batch_stats", batch_stats, "encoder")
    checks.arrays("vae.encode", phases=(phases, ("N", *_input_shape(config)), "float"))
    variables = {"params": params["encoder"], "batch_stats": batch_stats["encoder"]}
    features, moved = _encoder(config, dtype).apply(variables, phases, train, mutable=["batch_stats"])
    return features, {**batch_stats, "encoder": moved.get("batch_stats", {})}


def posterior(config: AutoencoderConfig, params: Params, embedding: jax.Array, *, dtype: Dtype) -> jax.Array:
    """Log-probabilities of q(z | frame) [.., K, C] (in at least float32) from the embedding [.., E]."""
    checks.instances("vae.posterior", config=(config, AutoencoderConfig))
    checks.parts("vae.posterior", "params", params, "posterior_head")
    checks.arrays("vae.posterior", embedding=(embedding, (..., config.embedding_size), "float"))
    raw = posterior_head(config, dtype).apply({"params": params["posterior_head"]}, embedding)
    return mixed_logits(config, raw)


def decode(
    config: AutoencoderConfig, params: Params, batch_stats: Params, latent: jax.Array, *, train: bool, dtype: Dtype
) -> tuple[jax.Array, Params]:
    """Frames from latents.

    Args:
      latent: [N, S], flattened one-hot samples.

    Returns:
      Frames 0..1 in phase layout [N, h/2, w/2, 4 channels], or symlog vectors [N, entries] (`to_frames` makes frames of
      them), in at least float32, and the batch statistics, moved if `train`.
    """
    checks.instances("vae.decode", config=(config, AutoencoderConfig))
    checks.parts("vae.decode", "params", params, "decoder")
    checks.parts("vae.decode", "batch_stats", batch_stats, "decoder")
    checks.arrays("vae.decode", latent=(latent, ("N", config.latent_size), "float"))
    variables = {"params": params["decoder"], "batch_stats": batch_stats["decoder"]}
    phases, moved = _decoder(config, dtype).apply(variables, latent, train, mutable=["batch_stats"])
    return phases, {**batch_stats, "decoder": moved.get("batch_stats", {})}

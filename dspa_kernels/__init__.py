"""Ops that steer language models through sparse autoencoders. They know tensors and SAE weights, nothing of models."""

from dspa_kernels.backends import BackendError, BackendStatus, available_backends
from dspa_kernels.checks import InputError
from dspa_kernels.cuda_library import CudaError
from dspa_kernels.formulas import n_words, product
from dspa_kernels.fusing import fuse, unfuse
from dspa_kernels.ops.activation_bits import activation_bits
from dspa_kernels.ops.activation_counts import activation_counts
from dspa_kernels.ops.activation_sums import activation_sums
from dspa_kernels.ops.bit_counts import bit_counts
from dspa_kernels.ops.fsrl_residual import FSRLOutput, fsrl_residual
from dspa_kernels.ops.lookup_and_steer import lookup_and_steer
from dspa_kernels.ops.map_lookup import map_lookup
from dspa_kernels.ops.place_tokens import PlacedTokens, PromptRows, place_tokens
from dspa_kernels.ops.sparse_decode import sparse_decode
from dspa_kernels.ops.sparse_encode import sparse_encode
from dspa_kernels.ops.steer import steer, steer_
from dspa_kernels.weights import (
    PATHS,
    Edits,
    EncoderStream,
    MapWeights,
    SAEShape,
    SAEWeights,
    SparseLatents,
    SteeringPlan,
)

__all__ = [
    "PATHS",
    "BackendError",
    "BackendStatus",
    "CudaError",
    "Edits",
    "EncoderStream",
    "FSRLOutput",
    "InputError",
    "MapWeights",
    "PlacedTokens",
    "PromptRows",
    "SAEShape",
    "SAEWeights",
    "SparseLatents",
    "SteeringPlan",
    "activation_bits",
    "activation_counts",
    "activation_sums",
    "available_backends",
    "bit_counts",
    "fsrl_residual",
    "fuse",
    "lookup_and_steer",
    "map_lookup",
    "n_words",
    "place_tokens",
    "product",
    "sparse_decode",
    "sparse_encode",
    "steer",
    "steer_",
    "unfuse",
]

"""Models: small networks for the built-in tasks, loading through Auto classes, and adapters that return rows."""

from understudy.models.adapters import (
    CausalLMAdapter,
    ClassifierAdapter,
    MarginalAdapter,
    MixtureAdapter,
    ModelAdapter,
    ModelOutput,
    find_head,
    state_hash,
)
from understudy.models.classifier_heads import replace_head
from understudy.models.diffusion import DenoiserAdapter, Sampler
from understudy.models.drawing import draw_samples
from understudy.models.encoder_decoders import EncoderDecoderAdapter, is_encoder_decoder
from understudy.models.heads import SubclassHead
from understudy.models.loading import is_new_causal_lm, load_causal_lm, load_classifier, own_classes
from understudy.models.masked_generator import MaskedGeneratorAdapter
from understudy.models.modes import evaluating
from understudy.models.nodes import NodeAdapter, load_nodes
from understudy.models.sequences import SequenceAdapter
from understudy.models.small import load_small, normalisation, save_small
from understudy.models.tokenizers import compare_tokenizers, load_tokenizer, tokenizer_hashes

__all__ = [
    "CausalLMAdapter",
    "ClassifierAdapter",
    "DenoiserAdapter",
    "EncoderDecoderAdapter",
    "MarginalAdapter",
    "MaskedGeneratorAdapter",
    "MixtureAdapter",
    "ModelAdapter",
    "ModelOutput",
    "NodeAdapter",
    "Sampler",
    "SequenceAdapter",
    "SubclassHead",
    "compare_tokenizers",
    "draw_samples",
    "evaluating",
    "find_head",
    "is_encoder_decoder",
    "is_new_causal_lm",
    "load_causal_lm",
    "load_classifier",
    "load_nodes",
    "load_small",
    "load_tokenizer",
    "normalisation",
    "own_classes",
    "replace_head",
    "save_small",
    "state_hash",
    "tokenizer_hashes",
]

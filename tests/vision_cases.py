"""Small vision-language models and sets of images, and recipes on the scenes."""

import json

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

TINY = "llava:hidden=16,layers=2,heads=2,vision=16"
SCENES = {
    "task": "vision_language",
    "data": {"name": "scenes", "size": 24, "pairs": 16, "eval_limit": 4, "max_new_tokens": 4},
    "teacher": {"model": TINY, "train": {"max_steps": 2, "per_device_train_batch_size": 4}},
    "student": TINY,
    "trainer": {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1},
}


def write_images(folder, number=30):
    """Images of one colour each, and a JSONL file of prompts about them."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for i in range(number):
        colour = np.full((24, 24, 3), 8 * i, dtype=np.uint8)
        Image.fromarray(colour).save(folder / "images" / f"{i}.png")
        rows.append({"image": f"images/{i}.png", "prompt": "which shade ?", "completion": f" shade {i}"})
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows


class ImageQwen2VLProcessor(Qwen2VLProcessor):
    """Qwen2-VL's own processor without its part for videos, which cannot be made without torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


AutoProcessor.register(Qwen2VLConfig, ImageQwen2VLProcessor, exist_ok=True)


def qwen2_vl_processor(tokenizer):
    """For images of 24 × 24 pixels, in patches of 4 × 4 of which four become one token; a template like the real one's."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    template = (
        "{% for message in messages %}{{ message.role }} {% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    pixels = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    return ImageQwen2VLProcessor(pixels, tokenizer, chat_template=template)


def tiny_qwen2_vl(tokenizer):
    named = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        **ends,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in named.items()}
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids, **ends))


def tiny_paligemma(tokenizer, both_ways=None):
    """PaliGemma and its processor, for images of 24 × 24 pixels; `both_ways` says whether its text model reads later tokens
    also where no token types are given, as by default."""
    kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    pixels = kind(size={"height": 24, "width": 24})
    pixels.image_seq_length = 9
    processor = PaliGemmaProcessor(pixels, tokenizer)
    sizes = {"intermediate_size": 32, "num_attention_heads": 2}
    text = {
        "model_type": "gemma",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "use_bidirectional_attention": both_ways,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "image_size": 24,
        "patch_size": 8,
    }
    vision |= {"projection_dim": 32, "vision_use_head": False}
    named = {"image_token_index": processor.image_token_id, "projection_dim": 32}
    torch.manual_seed(0)
    config = PaliGemmaConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, **named)
    return processor, PaliGemmaForConditionalGeneration(config)

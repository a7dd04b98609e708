"""Small vision-language models and sets of images, and recipes on the scenes."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

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


class PatchProcessor:
    """What Qwen2-VL's processor does to images of 8 × 8 pixels, without the video part that needs torchvision."""

    image_token = "<|image_pad|>"

    def __init__(self, tokenizer):
        from transformers import Qwen2VLImageProcessor

        marks = ["<|vision_start|>", "<|vision_end|>", self.image_token, "<|video_pad|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)

    def apply_chat_template(self, messages, **_):
        parts = [p.get("text", f"<|vision_start|>{self.image_token}<|vision_end|>") for p in messages[0]["content"]]
        return "".join(parts)

    chat_template = "as above"

    def __call__(self, text, images=None, return_tensors="pt"):
        fields = dict(self.image_processor(images=images, return_tensors="pt")) if images else {}
        (words,) = text
        for grid in fields.get("image_grid_thw", []):
            words = words.replace(self.image_token, "<placeholder>" * (int(grid.prod()) // 4), 1)
        ids = self.tokenizer(words.replace("<placeholder>", self.image_token), return_tensors="pt")
        marked = (ids["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)).long()
        return {
            "input_ids": ids["input_ids"],
            "attention_mask": ids["attention_mask"],
            "mm_token_type_ids": marked,
            **fields,
        }

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)


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

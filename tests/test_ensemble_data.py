"""The column of domains on its way to a batch, and members that answer from a cache."""

import json

import numpy as np
import pytest
import torch

from engine_cases import DIGITS, weights
from understudy import InputError, distill
from understudy.data import Batch, collate_text, encode, load_images, load_text, train_tokenizer
from understudy.runs.capture import capture_recipe
from understudy.runs.recipe import make


def test_packed_rows_and_splits_keep_domains_apart(tmp_path):
    lines = [json.dumps({"text": ("ab " if i % 2 else "xy ") * 20, "kind": i % 2}) for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    splits = load_text({"name": str(tmp_path / "d.jsonl"), "domain_column": "kind"})
    assert splits.domains == ("0", "1")
    assert [sum(r["domain"] == d for r in splits.test) for d in splits.domains] == [2, 2]
    tokenizer = train_tokenizer(splits.texts(), 262)
    rows, _ = encode(splits.train, tokenizer, max_length=16, pack=True)
    assert [r["id"] for r in rows.records] == list(range(len(rows)))
    batch = Batch.from_dict(collate_text(rows.records, domains=splits.domains))
    for ids, domain in zip(batch.inputs["input_ids"], batch.domains.tolist(), strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert ("x" in text or "y" in text) == (domain == 0) and ("a" in text or "b" in text) == (domain == 1)
    assert {r["domain"] for r in rows.records[:4]} == {"0", "1"}  # mixed evenly
    plain = load_text({"name": str(tmp_path / "d.jsonl")})
    assert "domain" not in plain.train[0] and plain.domains == ()


def test_images_of_one_domain(tmp_path):
    place = np.array(["a", "b", "b", "a"] * 30)
    np.savez(tmp_path / "set.npz", images=np.zeros((120, 4, 4), np.uint8), labels=np.arange(120) % 2, place=place)
    spec = {"name": str(tmp_path / "set.npz"), "domain_column": "place"}
    found = load_images(spec)
    assert found.domains == ("a", "b") and found.train[0][3] in found.domains
    assert set(load_images({**spec, "only": "b"}).train.domains) == {"b"}
    for changes, says in [
        ({"only": "c"}, "Unknown domain data.only='c'"),
        ({"domain_column": "palce"}, "palce"),
        ({"domain_column": None, "only": "a"}, "data.domain_column"),
        ({"name": "digits"}, "digits has no columns"),
    ]:
        with pytest.raises(InputError, match=says):
            load_images({**spec, **changes})


@pytest.mark.slow
def test_a_member_may_answer_from_a_cache(tmp_path):
    alone = make({**DIGITS, "output": str(tmp_path / "x")})
    capture_recipe(alone, tmp_path / "cache", "dense")
    members = {"stored": {"model": "mlp:16", "cache": str(tmp_path / "cache")}, "live": DIGITS["teacher"]}
    made = distill({**DIGITS, "teacher": {"members": members}, "output": str(tmp_path / "run"), "method": "kd"})
    assert "teacher_accuracy" not in made.metrics  # a cache knows no test split
    members["stored"] = DIGITS["teacher"]
    live = distill({**DIGITS, "teacher": {"members": members}, "output": str(tmp_path / "live"), "method": "kd"})
    assert "teacher_accuracy" in live.metrics
    one, two = weights(tmp_path / "run"), weights(tmp_path / "live")
    assert all(torch.allclose(one[k], two[k], atol=5e-3) for k in one)
    with pytest.raises(InputError, match=r"inner layer|only has outputs|only keeps its outputs"):
        distill({**DIGITS, "teacher": {"members": {"a": "mlp:16"}}, "output": str(tmp_path / "y"), "method": "lelp"})


def test_what_members_keep_is_tried_before_the_first_step(tmp_path):
    """A loss that their kind is not defined for, and kinds that do not mix, are one line, and nothing has been trained."""
    folders = {}
    for support in ("dense", "top_k:4"):
        folders[support] = str(tmp_path / support)
        capture_recipe(make({**DIGITS, "output": str(tmp_path / "x")}), tmp_path / support, support)
    members = {n: {"model": "mlp:16", "cache": f} for n, f in zip(("a", "b"), folders.values(), strict=True)}
    for method, chosen, says in [
        ("kd", members, "this ensemble: Members that answer with Dense and TopK cannot be mixed"),
        ("dhkd", {"b": members["b"]}, "this ensemble: .*not defined for TopK"),
    ]:
        with pytest.raises(InputError, match=says):
            distill({**DIGITS, "teacher": {"members": chosen}, "output": str(tmp_path / method), "method": method})
        assert not (tmp_path / method / "metrics.jsonl").exists()

"""Export to ONNX: the same outputs for other sizes of batches, quality and speed beside the student's, bad input."""

import json

import pytest
import torch

from engine_cases import DIGITS
from own_texts import model, words
from text_classes import as_csv, classifier, reviews
from understudy import InputError, distill
from understudy.cli import main
from understudy.data import Batch
from understudy.models import CausalLMAdapter, ClassifierAdapter
from understudy.models.heads import MixtureHead, head_name, put_head
from understudy.models.modalities import ModalitiesAdapter
from understudy.models.onnx import OnnxAdapter, write_onnx
from understudy.models.small import build_small
from understudy.runs.check import saved_student
from understudy.runs.exporting import export_run

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow
SHORT = {"max_steps": 20, "per_device_train_batch_size": 16}


def test_an_image_classifier_with_its_preprocessing(tmp_path, capsys):
    result = distill(**{**DIGITS, "method": "sft", "trainer": SHORT, "output": str(tmp_path / "run")})
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "run"), "--int8", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    models = found["models"]
    assert list(models) == ["student", "onnx", "int8"] and found["metric"] == "accuracy"
    assert models["onnx"]["quality"] == pytest.approx(result.metrics["accuracy"]) == models["student"]["quality"]
    assert models["onnx"]["agreement"] == 1 and models["int8"]["agreement"] > 0.8
    assert all(m["latency_seconds"] > 0 and m["bytes"] > 0 for m in models.values())
    assert "What was exported" in (tmp_path / "run" / "report.html").read_text()


def test_a_text_classifier(tmp_path):
    classifier(tmp_path / "student", steps=0)
    data = str(as_csv(tmp_path / "reviews.csv", reviews(120)))
    recipe = {"task": "text_classification", "method": "sft", "student": str(tmp_path / "student"), "data": data}
    distill({**recipe, "trainer": {**SHORT, "learning_rate": 1e-2}, "output": str(tmp_path / "run")})
    found = export_run(tmp_path / "run")["models"]
    assert found["onnx"]["agreement"] == 1 and found["onnx"]["quality"] == pytest.approx(found["student"]["quality"])


def test_a_causal_model_of_texts_of_any_length(tmp_path):
    tokenizer = words()
    adapter = CausalLMAdapter(model(tokenizer), len(tokenizer)).eval()

    def batch(examples, length):
        ids = torch.randint(0, len(tokenizer), (examples, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, length - 1 :] = 0
        return Batch(
            {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100), torch.arange(examples)
        )

    write_onnx(adapter, batch(2, 6), tmp_path / "model.onnx")
    exported = OnnxAdapter(tmp_path / "model.onnx", adapter)
    for examples, length in ((2, 6), (1, 3), (5, 11)):
        seen = batch(examples, length)
        with torch.no_grad():
            own = adapter(seen).signal
        logits = own.hidden @ own.weight.T
        torch.testing.assert_close(exported(seen).signal.logits, logits, atol=1e-5, rtol=1e-4)


def test_a_student_of_several_inputs_two_heads_or_16_bits(tmp_path):
    torch.manual_seed(0)
    shapes = {"picture": (1, 4, 4), "sound": (1, 1, 6)}
    ids, labels = torch.arange(4), torch.zeros(4).long()
    seen = Batch({name: torch.rand(4, *shape) for name, shape in shapes.items()}, labels, ids)
    read = ModalitiesAdapter(build_small("fusion:8,8", 3, tuple(shapes.values())), 3, list(shapes))
    image = build_small("mlp:8", 3, (1, 4, 4))
    put_head(image, head_name(image, 3), MixtureHead(8, 3, 0.6, 0.5))
    two = ClassifierAdapter(image, 3)
    half = ClassifierAdapter(build_small("mlp:8", 3, (1, 4, 4)).bfloat16(), 3)
    pixels = Batch({"pixel_values": seen.inputs["picture"]}, labels, ids)
    for name, adapter, batch in (("several", read, seen), ("heads", two, pixels), ("half", half, pixels)):
        adapter.eval()
        write_onnx(adapter, batch, tmp_path / f"{name}.onnx")
        with torch.no_grad():
            own = adapter(batch).signal.logits.float()
        exported = OnnxAdapter(tmp_path / f"{name}.onnx", adapter)
        torch.testing.assert_close(exported(batch).signal.logits, own, atol=3e-2 if name == "half" else 1e-5, rtol=1e-2)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_model_that_cannot_be_traced_is_one_line(tmp_path, capfd):
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(16, 3)

        def forward(self, pixels):
            return self.head(pixels.flatten(1)) if pixels.sum() > 3 else self.head(pixels.flatten(1) * 2)

    batch = Batch({"pixel_values": torch.rand(2, 1, 4, 4)}, torch.zeros(2).long(), torch.arange(2))
    with pytest.raises(InputError, match=r"torch cannot export Branching to ONNX: .*data-dependent") as error:
        write_onnx(ClassifierAdapter(Branching(), 3), batch, tmp_path / "model.onnx")
    assert not {"\n", "\x1b"} & set(str(error.value))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_run_that_is_trained_on_shows_no_old_export(tmp_path):
    recipe = {**DIGITS, "method": "sft", "trainer": SHORT, "output": str(tmp_path)}
    distill(recipe)
    export_run(tmp_path)
    distill({**recipe, "trainer": {**SHORT, "max_steps": 30}})
    assert "What was exported" not in (tmp_path / "report.html").read_text()


def test_what_cannot_be_exported_is_one_line(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        export_run(tmp_path)
    recipe = {"task": "preference_world", "method": "dpo", "data": {"name": "chains"}, "output": str(tmp_path / "run")}
    distill({**recipe, "trainer": {"max_steps": 2}})
    with pytest.raises(
        InputError, match="run is a run of preference_world, which evaluates by more than a model's logits"
    ):
        export_run(tmp_path / "run")
    assert saved_student(tmp_path / "run")[0].task == "preference_world"


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_is_cut_off_leaves_the_former_file_whole(tmp_path, monkeypatch, stopped):
    student = ClassifierAdapter(build_small("mlp:4", 3, (1, 4, 4)), 3)
    batch = Batch({"pixel_values": torch.rand(2, 1, 4, 4)}, torch.zeros(2).long(), torch.arange(2))
    file = tmp_path / "export" / "model.onnx"
    file.parent.mkdir()
    file.write_bytes(b"the former")

    class Program:
        def save(self, path):
            with open(path, "wb") as half:
                half.write(b"half of the n")
            raise stopped

    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *args, **how: Program())
        with pytest.raises((KeyboardInterrupt, InputError)):
            write_onnx(student, batch, file)
    assert file.read_bytes() == b"the former" and [p.name for p in file.parent.iterdir()] == ["model.onnx"]

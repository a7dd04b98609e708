"""What the tests of paper 29, HARD, share: models and signals in float64, one turn of each side, a trainer."""

import torch

from understudy.data import Batch, collate_images
from understudy.models import ClassifierAdapter
from understudy.models.small import build_small
from understudy.teachers import LocalTeacher
from understudy.training import AuxiliaryContext, DistillationTrainer, TrainModule, TrainState
from understudy.training.arguments import training_arguments
from understudy.training.reduction import Counts
from understudy.training.shapes import probe

SIGNAL = (1, 1, 40)
EAGER = {"l_min": 1e3, "l_max": 1e4, "max_augmentor_steps": 1}  # student, augmentor, student, augmentor, …


def net(name="mlp:12", shape=SIGNAL, seed=0):
    torch.manual_seed(seed)
    return ClassifierAdapter(build_small(name, 5, shape).double(), 5)


def signals(number=12, shape=SIGNAL):
    x = torch.rand(number, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch({"pixel_values": x}, torch.arange(number) % 5, torch.arange(number))


def played(method, student, teacher, batch, module=None):
    """The augmentor's terms, its gradient of the minimised sum, and the student's terms."""
    shapes = probe(method, 5, {"student": student, "teacher": teacher}, {"student": {}, "teacher": {}}, batch)
    module = module or method.modules(shapes)["augmentor"].double()
    local = LocalTeacher(teacher, "t")
    state = TrainState({"augmentor": module}, student=student, teacher=local, method_state=method.init_state(9))
    context = AuxiliaryContext(student, local, [batch], Counts(batch.num_items, batch.num_items), lambda n: batch, list)
    (terms,) = method.auxiliary_loss("augmentor", context, state)
    loss = sum(t.weight * t.values.sum() for t in terms.values())
    grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
    theirs = method.loss(student(batch), local(batch), batch, state)
    return terms, grads, theirs


def trainer(method, tmp_path, micro=12, accumulate=1, steps=2, teacher="circular:4", shape=SIGNAL, **more):
    student, teaching, batch = net(shape=shape), net(teacher, shape, 1), signals(shape=shape)
    items = [(x, int(y), int(i)) for x, y, i in zip(batch.inputs["pixel_values"], batch.labels, batch.ids, strict=True)]
    values = {"max_steps": steps, "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
    values |= {"save_strategy": "no", "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
    args = training_arguments({**values, "max_grad_norm": 0.0, **more}, tmp_path, 0)
    shapes = probe(method, 5, {"student": student, "teacher": teaching}, {"student": {}, "teacher": {}}, batch)
    train_module = TrainModule(student, method, shapes, steps).double()
    # float64 tensors stay as they are: the collator would make them float32
    collate = lambda chosen: {**collate_images(chosen), "pixel_values": torch.stack([c[0] for c in chosen])}  # noqa: E731
    return DistillationTrainer(train_module, args, items, collate, teacher=LocalTeacher(teaching, "t"))

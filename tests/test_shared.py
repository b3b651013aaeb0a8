"""One module in several threads and processes, and in what training wraps around it: the same results as alone."""

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conv1x1_ext import Conv1x1Act, Conv1x1AvgPool

pytestmark = pytest.mark.cpu_only(reason="the threads and processes share the CPU")


def model():
    return nn.Sequential(
        Conv1x1Act(8, 16, activation="relu"),
        Conv1x1Act(16, 16, stride=2, groups=2, activation="silu"),
        Conv1x1AvgPool(16, 4),
    )


def gradients(module, x):
    return torch.autograd.grad(module(x).float().square().sum(), [x, *module.parameters()])


def plain(module, x):
    return gradients(module, x)


def under_autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x) + module(x)
    return torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])


def under_inference_mode(module, x):
    with torch.inference_mode():
        return [module(x)]


def under_autocast_without_gradients(module, x):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return [module(x)]


def create_graph(module, x):
    (g,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), list(module.parameters())[:1])


USES = [plain, under_autocast, under_inference_mode, under_autocast_without_gradients, create_graph]


def test_threads_of_different_uses_do_not_disturb_each_other():
    module, x = model(), torch.randn(2, 8, 6, 5, requires_grad=True)
    expected = [use(module, x) for use in USES]
    start, errors = threading.Barrier(len(USES)), []

    def work(use, alone):
        try:
            torch.set_num_threads(1)
            start.wait()
            for _ in range(30):
                for found, e in zip(use(module, x), alone, strict=True):
                    assert torch.equal(found, e), use.__name__
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(USES, expected, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors


def in_a_process(connection, module, x):
    torch.set_num_threads(1)
    connection.send([g.numpy() for g in gradients(module, x)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method):
    """A fork after the parent's kernels ran, and a process that gets the module pickled."""
    torch.set_num_threads(1)
    module, x = model(), torch.randn(2, 8, 6, 5, requires_grad=True)
    expected = gradients(module, x)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=in_a_process, args=(theirs, module, x))
    process.start()
    assert ours.poll(60)
    found = ours.recv()
    process.join()
    assert process.exitcode == 0
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(f), e)


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_compute_the_same(make):
    module, x = model(), torch.randn(2, 8, 6, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
        other = make(module)
    assert all(torch.equal(f, e) for f, e in zip(gradients(other, x), gradients(module, x), strict=True))
    assert not any(a is b for a, b in zip(other.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    module, x = model(), torch.randn(2, 8, 6, 5, requires_grad=True)
    expected = gradients(module, x)
    checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    for f, e in zip(found, expected, strict=True):  # without gradients the kernel's own SiLU runs
        torch.testing.assert_close(f, e, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrapped", ["eager", "compiled"])
def test_compiled_autograd(wrapped):
    module, x = model(), torch.randn(2, 8, 6, 5, requires_grad=True)
    expected = gradients(module, x)
    torch._dynamo.reset()
    run = torch.compile(module, backend="aot_eager") if wrapped == "compiled" else module
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        run(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_a_scaled_step_and_an_average_of_models():
    """GradScaler skips a step whose gradients overflow; an exponential average follows the others."""
    module, x = model(), torch.randn(2, 8, 6, 5)
    average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = [p.detach().clone() for p in module.parameters()]
        mean = [p.detach().clone() for p in average.module.parameters()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x * (float("inf") if step == 1 else 1)).float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update_parameters(module)
        moved = any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        assert moved == (step != 1)
        for old, new, now in zip(mean, average.module.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(new, (old + now.detach()) / 2)
        torch.testing.assert_close(average(x), copy.deepcopy(average.module)(x))
    assert scaler.get_scale() == 2.0**9

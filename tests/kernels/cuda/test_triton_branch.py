"""A branch of a block that recomputes, with all gradients, against the specification."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim
from gigavim.training import encode
from gigavim.training.memory import WORK_BYTES
from gigavim_kernels import naive, selftest
from gigavim_kernels.weights import BlockWeights

gpu = pytest.mark.gpu


def run(branch, stream, **given):
    from gigavim_kernels.cuda.branch import vim_branch
    from gigavim_kernels.cuda.directions import stack

    return vim_branch(
        stream, branch.norm_weight, branch.norm_eps, branch.in_proj, branch.out_proj * branch.scale,
        stack(branch.directions), **given,
    )  # fmt: skip


def specified(branch, stream, keep):
    found = [naive.vim_block(BlockWeights((branch,)), row) for row in stream]
    return torch.stack([row + k * (f - row) for row, f, k in zip(stream, found, keep)])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["v2", "v1", "none", "layer_pairs"])
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "chunk", "half"),
    [
        pytest.param(1, 1, 8, None, False, id="one token"),
        pytest.param(2, 9, 8, None, False, id="whole"),
        pytest.param(2, 11, 8, 4, False, id="in chunks"),
        pytest.param(1, 5, 8, 1, False, id="chunks shorter than the halo"),
        pytest.param(1, 7, 8, 4, True, id="bf16"),
        pytest.param(3, 1001, 192, None, False, id="large", marks=gpu),
        pytest.param(3, 1001, 192, 333, False, id="large in chunks", marks=gpu),
        pytest.param(3, 1001, 192, 333, True, id="large in chunks, bf16", marks=gpu),
    ],
)
def test_stream_and_gradients_meet_the_specification(
    random_block, relative_error, device, kind, batch, length, d_model, chunk, half, tied
):
    block = random_block(kind, d_model=d_model, states=8)
    branch = (selftest.with_one_rate(block) if tied else block).branches[0]
    stream, weights = torch.randn(batch, length, d_model), torch.randn(batch, length, d_model)
    keep = torch.arange(1.0, batch + 1) / batch
    mine, found_in = selftest.leaves(branch, stream, device, torch.float32)
    theirs, expected_in = selftest.leaves(branch, stream, torch.device("cpu"), torch.float64)
    rows, exact = found_in["stream"], expected_in["stream"]
    found = run(mine, rows, keep=keep.to(device), half=half, chunk=chunk)
    expected = specified(theirs, exact, keep)
    (found * weights.to(device)).sum().backward()
    (expected * weights).sum().backward()
    limit = 8e-2 if half else 1e-5
    assert relative_error((found - rows).detach().cpu(), (expected - exact).detach()) < limit
    for name, leaf in found_in.items():
        assert relative_error(leaf.grad.cpu(), expected_in[name].grad) < limit, name


def test_results_do_not_depend_on_the_chunks(random_block, relative_error, device):
    branch = random_block("v2", d_model=8, states=8).branches[0]
    stream = torch.randn(1, 13, 8, device=device)
    results = []
    for chunk in (13, 6):
        mine, given = selftest.leaves(branch, stream, device, torch.float32)
        found = run(mine, given["stream"], chunk=chunk)
        (found * stream.cos()).sum().backward()
        results.append({"found": found.detach()} | {n: t.grad for n, t in given.items()})
    for name, whole in results[0].items():
        assert relative_error(results[1][name], whole) < 2e-6, name


def test_no_tokens(random_block, device):
    branch = random_block("v2", d_model=8, states=8).branches[0]
    mine, given = selftest.leaves(branch, torch.zeros(2, 0, 8), device, torch.float32)
    found = run(mine, given["stream"])
    found.sum().backward()
    assert found.shape == given["stream"].grad.shape == (2, 0, 8)
    assert not mine.in_proj.grad.any()


def test_what_is_not_a_number_stays_where_causality_puts_it(random_block, device):
    branch = random_block("none", d_model=8, states=8).branches[0]
    stream = torch.randn(1, 9, 8)
    stream[0, 5] = float("nan")
    mine, given = selftest.leaves(branch, stream, device, torch.float32)
    found = run(mine, given["stream"], chunk=4).isnan()
    assert found[0, 5:].all()
    assert not found[0, :5].any()


def test_the_operator_keeps_torchs_contracts(random_block, device):
    from gigavim_kernels.cuda import branch as module
    from gigavim_kernels.cuda.directions import stack

    mine = random_block("v2", d_model=8, states=8).branches[0]
    d = stack(mine.directions)
    weights = (mine.norm_weight, mine.in_proj, mine.out_proj, *d.tensors)
    weights = [w.to(device).contiguous().requires_grad_() for w in weights]
    stream = torch.randn(1, 5, 8, device=device, requires_grad=True)
    settings = (1e-5, list(d.reverse), list(d.reverse_conv), False, 3)
    torch.library.opcheck(module._forward, (stream, None, weights, *settings))


def test_autocast_around_it_changes_nothing(random_block, device):
    branch = random_block("v2", d_model=8, states=8).branches[0]
    results = []
    for enabled in (False, True):
        mine, given = selftest.leaves(branch, torch.randn(1, 5, 8), device, torch.float32)
        given["stream"].data.fill_(0.3)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            found = run(mine, given["stream"])
            found.sum().backward()
        results.append([found.detach(), *(t.grad for t in given.values())])
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("tied", [False, True])
def test_the_check_of_a_machine_passes(device, tied):
    small = {} if device.type == "cuda" else {"d_model": 8, "states": 8, "length": 20}
    assert selftest.check_branch(device, **small, tied=tied).ok


@pytest.mark.parametrize("kind", ["v2", "layer_pairs"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_gives_what_other_kernels_give(monkeypatch, relative_error, kind, tied):
    """Plain torch; for tied rates, of which it knows nothing, those of the CPU."""
    torch.manual_seed(0)
    config = replace(
        REGISTRY["vim-nano"], d_model=16, depth=2, bidirectional=kind,
        divide_out=kind == "v2", grid_hw=(2, 2),
    )  # fmt: skip
    encoder = Vim(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("_log"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randn(2, 5, 16)
    gradients = []
    for add in (encode._add_on_gpu, encode._add_on_cpu if tied else encode._add_plainly):
        monkeypatch.setattr(encode, "layer_kernel", lambda *_, add=add: encode.LayerKernel(add))
        encoder.zero_grad()
        (encode.encode(encoder, tokens, tied=tied) * tokens.cos()).sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, found in gradients[0].items():
        assert relative_error(found, gradients[1][name]) < 1e-4, name


class Alive(TorchDispatchMode):
    """The bytes of tensors made within it that are alive at once, at most."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._seen = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place not in self._seen:
            self._seen[place] = size
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, place)

    def _forget(self, place):
        self.now -= self._seen.pop(place)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_take_what_training_reckons_with(random_block, device, tied):
    from gigavim_kernels.cuda.directions import stack
    from gigavim_kernels.cuda.recompute import branch_gradients, prepare

    width, most = 64, []
    block = random_block("v2", d_model=width, states=16)
    branch = (selftest.with_one_rate(block) if tied else block).branches[0]
    directions = stack(branch.directions)
    given = (branch.norm_weight, branch.in_proj, branch.out_proj, *directions.tensors)
    weights = [w.float().contiguous().to(device) for w in given]
    ready = prepare(weights, branch.norm_eps, directions.reverse, directions.reverse_conv, True)
    for length in (16, 48):
        stream, grad = (torch.randn(1, length, width, device=device) for _ in range(2))
        entries = torch.zeros(1, 2, 1, 2 * width, 16, device=device)
        sums = [torch.zeros_like(w) for w in weights]
        with torch.no_grad(), Alive() as alive:
            branch_gradients(ready, stream, None, entries, grad, sums, length)
        most.append(alive.most)
    per_token = (most[1] - most[0]) / 32 - 4 * width  # but for the stream's gradient
    assert 0.7 * WORK_BYTES < per_token / (2 * width) <= WORK_BYTES

"""The Triton scan against the specification in float64, and what must hold whatever the numbers."""

import pytest
import torch

from gigavim_kernels import naive

gpu = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture
def scan():
    from gigavim_kernels.cuda.scan import join, scan

    def run(*, B, C, **given):
        return scan(bc=join(B, C), **given)

    return run


def draw(directions, batch, length, channels, states, device, dtype=torch.float32):
    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape).to(device, dtype)

    return {
        "x": normal(directions, batch, length, channels, dtype=dtype),
        "dt": (normal(directions, batch, length, channels) * 2 - 2).to(dtype),
        "A": -torch.rand(directions, channels, states).to(device) * 8 - 0.01,
        "B": normal(directions, batch, length, states, dtype=dtype),
        "C": normal(directions, batch, length, states, dtype=dtype),
        "D": normal(directions, channels),
        "z": normal(batch, length, channels, dtype=dtype),
        "dt_bias": normal(directions, channels),
        "first": normal(directions, batch, channels, states),
    }


def specified(given, reverse):
    given = {name: None if t is None else t.double() for name, t in given.items()}
    per_direction = [
        naive.selective_scan(
            **{n: None if given[n] is None else given[n][s] for n in ("x", "dt", "A", "B", "C")},
            **{n: None if given[n] is None else given[n][s] for n in ("D", "dt_bias")},
            z=given["z"],
            state=None if given["first"] is None else given["first"][s],
            reverse=r,
        )
        for s, r in enumerate(reverse)
    ]
    y = torch.stack([found.y for found in per_direction]).sum(0)
    last, decay = (torch.stack([found[i] for found in per_direction]) for i in (1, 2))
    return y, last, decay.float()  # of many tokens it may be below the least of float32


BOTH, FORWARD, REVERSE = (False, True), (False,), (True,)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "reverse", "chunk"),
    [
        pytest.param(1, 1, 5, 8, BOTH, None, id="one token"),
        pytest.param(3, 2, 33, 8, REVERSE, None, id="two tokens"),
        pytest.param(1, 3, 100, 8, FORWARD, 2, id="three tokens, odd channels"),
        pytest.param(1, 31, 20, 16, BOTH, 9, id="a last chunk of 4"),
        pytest.param(2, 33, 8, 8, REVERSE, 16, id="a last chunk of 1"),
        pytest.param(1, 9, 7, 32, BOTH, 4, id="32 states"),
        pytest.param(1, 27, 6, 8, FORWARD, 1, id="chunks of one token"),
        *(
            pytest.param(batch, length, channels, states, BOTH, None, marks=gpu)
            for batch, length in ((3, 63), (1, 64), (3, 65), (1, 1000), (1, 4097))
            for channels in (32, 100, 192, 384, 768, 1536)
            for states in (8, 16, 32)
            if length < 1000 or channels * states <= 768 * 16
        ),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_float32_meets_the_specification(
    scan, relative_error, device, batch, length, channels, states, reverse, chunk, tied
):
    given = draw(len(reverse), batch, length, channels, states, device)
    if tied:
        given["A"] = given["A"][..., :1].contiguous()
    found = scan(**given, reverse=reverse, chunk=chunk)
    limits = 1e-5, 1e-5, 3e-5  # a decay's exponent is near 80 over long sequences, and rounded too
    for got, expected, limit in zip(found[:3], specified(given, reverse), limits):
        assert relative_error(got, expected) < limit


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "length", [pytest.param(13, id="short"), pytest.param(4097, marks=gpu, id="long")]
)
def test_half_precision_rounds_only_what_it_stores(
    scan, relative_error, device, dtype, length, tied
):
    given = draw(1, 2, length, 24, 8, device, dtype)
    if tied:
        given["A"] = given["A"][..., :1].contiguous()
    found = scan(**given, reverse=REVERSE, chunk=6 if length < 100 else None)
    assert found.y.dtype == dtype
    y, last, _ = specified(given, REVERSE)
    assert relative_error(found.y, y) < TOLERANCE[dtype]
    assert relative_error(found.last, last) < TOLERANCE[torch.float32]


def test_what_is_optional_may_be_absent(scan, relative_error, device):
    given = draw(2, 1, 11, 9, 8, device)
    given.update(D=None, z=None, dt_bias=None, first=None)
    for chunk in (4, 11):
        found = scan(**given, reverse=BOTH, chunk=chunk)
        for got, expected in zip(found[:3], specified(given, BOTH)):
            assert relative_error(got, expected) < TOLERANCE[torch.float32]


def test_no_tokens_leave_the_state_as_it_is(scan, device):
    given = draw(1, 2, 0, 8, 8, device)
    found = scan(**given, reverse=FORWARD)
    assert found.y.shape == (2, 0, 8)
    assert torch.equal(found.last, given["first"])
    assert torch.equal(found.decay, torch.ones_like(found.last))


def test_strided_inputs_are_read_where_they_lie(scan, device):
    given = draw(1, 1, 10, 12, 8, device)
    wide = torch.randn(1, 1, 10, 12 + 8 + 8 + 12).to(device)
    parts = wide.split((12, 8, 8, 12), 3)
    given.update(x=parts[0], B=parts[1], C=parts[2], z=parts[3][0])
    dense = {name: t.contiguous() for name, t in given.items()}
    assert torch.equal(
        scan(**given, reverse=REVERSE, chunk=4).y, scan(**dense, reverse=REVERSE, chunk=4).y
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_a_nan_reaches_the_tokens_after_it_and_no_others(scan, device, reverse):
    given = draw(1, 2, 14, 10, 8, device)
    given["x"][0, 1, 6, 3] = float("nan")
    found = scan(**given, reverse=(reverse,), chunk=4)
    reached = torch.zeros(2, 14, 10, dtype=torch.bool)
    reached[1, slice(None, 7) if reverse else slice(6, None), 3] = True
    assert torch.equal(found.y.isnan().cpu(), reached)
    assert torch.equal(found.last.isnan().any(-1).nonzero().cpu(), torch.tensor([[0, 1, 3]]))


def test_a_huge_step_forgets_the_past(scan, device):
    given = draw(1, 1, 12, 6, 8, device)
    given["dt"][0, 0, 5] = 1e30
    given["x"][0, 0, 5] = 0
    other = {**given, "first": given["first"] + 1}
    assert scan(**given, reverse=FORWARD, chunk=4).y.isfinite().all()
    assert torch.equal(
        scan(**given, reverse=FORWARD, chunk=4).y[:, 6:],
        scan(**other, reverse=FORWARD, chunk=4).y[:, 6:],
    )


@pytest.mark.parametrize("chunk", [None, 4])
def test_steps_may_be_given_in_place_of_dt(scan, relative_error, device, chunk):
    given = draw(2, 1, 11, 6, 8, device)
    expected = scan(**given, reverse=BOTH, chunk=chunk)
    bias = given.pop("dt_bias")[:, None, None]
    given["dt"] = torch.nn.functional.softplus(given["dt"] + bias)
    found = scan(**given, reverse=BOTH, chunk=chunk, steps=True)
    assert relative_error(found.y, expected.y) < 1e-5
    assert relative_error(found.last, expected.last) < 1e-5


def test_tiny_steps_keep_their_digits(scan, relative_error, device):
    given = draw(1, 1, 12, 6, 8, device)
    given["dt"] = given["dt"] - 12
    given.update(D=None, first=None)
    found = scan(**given, reverse=FORWARD, chunk=5)
    assert relative_error(found.y, specified(given, FORWARD)[0]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("reverse", [False, True])
def test_tied_rates_are_rates_in_the_ratio(scan, relative_error, device, reverse):
    """Decays close to one: what a step forgets is then the difference of nearly equal numbers."""
    given = draw(1, 1, 40, 6, 16, device)
    given["dt"] = given["dt"] - 8
    given["A"] = given["A"][..., :1].contiguous()
    tied = scan(**given, reverse=(reverse,), chunk=16)
    given["A"] = naive.spread_rates(given["A"], 16)
    spread = scan(**given, reverse=(reverse,), chunk=16)
    for one, other in zip(tied[:3], spread[:3]):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_fills_the_chip_once(tied):
    from gigavim_kernels.cuda.plan import FORWARD, FORWARD_TIED, plan_scan

    kernel = FORWARD_TIED if tied else FORWARD
    for batch, length in ((1, 1_048_576), (32, 6_084), (1, 12_000_000), (2, 65_536), (4, 9_999)):
        plan = plan_scan(batch, length, 384, 16, multiprocessors=132, kernel=kernel)
        programs = batch * plan.chunks * plan.blocks_e
        assert (0.8 if plan.chunk > 300 else 0.45) < programs / (132 * kernel.resident) <= 1
        assert (plan.chunks - 1) * plan.chunk < length <= plan.chunks * plan.chunk
    many = plan_scan(512, 6_084, 384, 16, multiprocessors=132, kernel=kernel)
    assert many.chunks == 1
    assert plan_scan(1, 1, 1, 8, multiprocessors=132).chunk == 1


def test_a_program_takes_as_many_channels_as_are_there():
    from gigavim_kernels.cuda.plan import FORWARD_TIED

    widths = {384: 128, 128: 128, 192: 64, 96: 32, 100: 128, 33: 64, 5: 32}
    assert {c: FORWARD_TIED.block_e(c, 16) for c in widths} == widths
    assert FORWARD_TIED.block_e(384, 32) == 32

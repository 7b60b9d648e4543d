"""Muon against a plain loop, the singular values it makes, and that everything else is AdamW."""

import copy
import math

import pytest
import torch

import main
from support.muon import MOMENTUM, RMS, Muon, orthogonalize
from xlnet import XLNet

SHAPES = [(6, 2, 3), (6, 2, 3), (6, 6), (4, 6), (6, 4)]


def parameters_and_gradients(n_steps):
    """Return parameters of SHAPES and random gradients of each step."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return parameters, [[torch.randn(shape) for shape in SHAPES] for _ in range(n_steps)]


def make_steps(optimizer, parameters, gradients):
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_singular_values_come_near_one(shape):
    """And the singular vectors stay: the product of both is the polar factor, up to those values."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, before, v = torch.linalg.svd(matrices, full_matrices=False)
    after = (u.mT @ orthogonalize(matrices) @ v.mT).diagonal(dim1=1, dim2=2)
    large = before / before.norm(dim=1, keepdim=True) > 0.01  # smaller ones are still on their way
    assert (after[large] > 0.65).all() and (after[large] < 1.25).all()
    rebuilt = u @ torch.diag_embed(after) @ v
    torch.testing.assert_close(rebuilt, orthogonalize(matrices), rtol=0, atol=1e-4)


def test_a_loop_over_single_matrices_does_the_same():
    """Momentum with Nesterov's look ahead, decay, and an update of RMS 0.2 times the rate, whatever the shape."""
    parameters, gradients = parameters_and_gradients(n_steps=4)
    expected = [parameter.detach().clone().flatten(1) for parameter in parameters]
    momenta = [torch.zeros_like(matrix) for matrix in expected]
    for of_step in gradients:
        for matrix, momentum, gradient in zip(expected, momenta, of_step, strict=True):
            gradient = gradient.flatten(1)
            momentum.mul_(MOMENTUM).add_((1 - MOMENTUM) * gradient)
            look_ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
            update = RMS * math.sqrt(max(matrix.shape)) * orthogonalize(look_ahead[None])[0]
            assert update.square().mean().sqrt() == pytest.approx(RMS, rel=0.25)
            matrix.mul_(1 - 0.1 * 0.02).sub_(0.1 * update)
    make_steps(Muon([{"params": parameters, "weight_decay": 0.02, "muon": True}], lr=0.1), parameters, gradients)
    for parameter, matrix in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().flatten(1), matrix)


def test_other_groups_are_adamw():
    parameters, gradients = parameters_and_gradients(n_steps=3)
    others = copy.deepcopy(parameters)
    make_steps(Muon([{"params": parameters, "weight_decay": 0.1}], lr=0.1), parameters, gradients)
    make_steps(torch.optim.AdamW(others, lr=0.1, weight_decay=0.1), others, gradients)
    for parameter, other in zip(parameters, others, strict=True):
        assert torch.equal(parameter, other)


def test_found_inf_skips_an_update():
    """Not a bit of weights and momentum changes, whatever the gradient is; the next update is as if it never was."""
    results = []
    for n_skipped in (0, 1):
        parameters, gradients = parameters_and_gradients(n_steps=2)
        optimizer = Muon([{"params": parameters, "weight_decay": 0.1, "muon": True}], lr=0.1, fused=True)
        make_steps(optimizer, parameters, gradients[:1])
        optimizer.found_inf = torch.ones(())
        make_steps(optimizer, parameters, n_skipped * [[torch.full(shape, math.nan) for shape in SHAPES]])
        optimizer.found_inf = torch.zeros(())
        make_steps(optimizer, parameters, gradients[1:])
        results.append([*parameters, *(optimizer.state[parameter]["exp_avg"] for parameter in parameters)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_state_survives_a_file(tmp_path):
    """An optimizer with the state of another, saved and loaded, makes the same next update."""
    parameters, gradients = parameters_and_gradients(n_steps=2)
    optimizer = Muon([{"params": parameters, "muon": True}], lr=0.1)
    make_steps(optimizer, parameters, gradients[:1])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others = copy.deepcopy(parameters)
    other = Muon([{"params": others, "muon": True}], lr=0.1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each, its_parameters in (optimizer, parameters), (other, others):
        make_steps(each, its_parameters, gradients[1:])
    for parameter, same in zip(parameters, others, strict=True):
        assert torch.equal(parameter, same)


def test_matrices_of_a_model():
    """Those of attention and feed-forward layers: seven a layer. Embeddings and vectors are left to AdamW."""
    model = XLNet(50, n_layer=2)
    args, _, _ = main.read_flags(["--optimizer", "muon", "--weight_decay", "0.3"])
    optimizer = main.make_optimizer(model, args)
    [matrices] = [group for group in optimizer.param_groups if group["muon"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in matrices["params"]}
    ends = (
        "rel_attn.q",
        "rel_attn.k",
        "rel_attn.v",
        "rel_attn.o",
        "rel_attn.r",
        "ff.layer_1.weight",
        "ff.layer_2.weight",
    )
    assert found == {f"layer.{number}.{end}" for number in range(2) for end in ends}
    assert matrices["weight_decay"] == 0.3
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)

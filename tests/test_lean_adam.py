"""LeanAdam, which `lean` makes of a fused torch.optim.Adam, against that: the same bits in every idiom."""

import copy

import dqn
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def network() -> nn.Sequential:
    """The same whenever it is called."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def step(net: nn.Module, optimizer, number: int) -> None:
    """As any tutorial has it; the data depend on the step's number."""
    optimizer.zero_grad()
    backward(net, number)
    optimizer.step()


def backward(net: nn.Module, number: int) -> torch.Tensor:
    """The gradient of a loss that uses every parameter."""
    loss = net(torch.linspace(-1, 1, 12).view(4, 3).add(number).sin()).square().sum()
    loss.backward()
    return loss


def steps(net, optimizer, log) -> None:
    for number in range(4):
        step(net, optimizer, number)


def frozen_in_mid_run(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    net[0].requires_grad_(False)
    steps(net, optimizer, log)


def a_gradient_that_is_missing(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    optimizer.zero_grad()
    backward(net, 5)
    net[2].bias.grad = None
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def gradients_that_add_up(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    backward(net, 6)
    backward(net, 7)
    optimizer.step()


def zeros_in_place_of_none(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    optimizer.zero_grad(set_to_none=False)
    log.append([p.grad.abs().max().item() for p in net.parameters()])
    optimizer.step()


def none_by_default(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    optimizer.zero_grad()
    log.append([p.grad for p in net.parameters()])


def another_rate(net, optimizer, log) -> None:
    for number in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        step(net, optimizer, number)


def a_rate_in_a_tensor(net, optimizer, log) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.03)
    steps(net, optimizer, log)


def option(**options):
    """An idiom: these options of the group from the third step on, when Adam has a state."""

    def changed(net, optimizer, log) -> None:
        steps(net, optimizer, log)
        optimizer.param_groups[0].update(options)
        for state in optimizer.state.values():
            state["max_exp_avg_sq"] = torch.full_like(state["exp_avg"], 0.1)
        steps(net, optimizer, log)

    return changed


def a_group_added(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    more = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [more], "lr": 0.2, "weight_decay": 0.1})
    for number in range(3):
        optimizer.zero_grad()
        (more.square().sum() + 0 * backward(net, number).detach()).backward()
        optimizer.step()
    log.append(more.tolist())


def a_parameter_replaced(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    net[2].bias = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"][-1] = net[2].bias
    steps(net, optimizer, log)


def a_closure(net, optimizer, log) -> None:
    steps(net, optimizer, log)

    def closure():
        optimizer.zero_grad()
        return backward(net, 8)

    log.append(optimizer.step(closure).item())


def hooks(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    optimizer.register_step_pre_hook(lambda *_: log.append("before"))
    step(net, optimizer, 9)


def a_hook_after(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    optimizer.register_step_post_hook(lambda *_: log.append("after"))
    step(net, optimizer, 9)


def global_hook(register):
    """An idiom: a hook of all optimisers."""

    def hooked(net, optimizer, log) -> None:
        steps(net, optimizer, log)
        handle = register(lambda *_: log.append("global"))
        step(net, optimizer, 9)
        handle.remove()
        step(net, optimizer, 10)

    return hooked


def a_copy_with_hooks(net, optimizer, log) -> None:
    """Which PyTorch might call twice in a subclass."""
    steps(net, optimizer, log)
    both = copy.deepcopy([net, optimizer])
    both[1].register_step_pre_hook(lambda *_: log.append("before"))
    step(*both, 9)
    log.append([p.tolist() for p in both[0].parameters()])


def a_scheduler(net, optimizer, log) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for number in range(4):
        step(net, optimizer, number)
        scheduler.step()


def grad_scaler(unscales: bool):
    """An idiom: gradients of a scaled loss, which the scaler or the optimiser divides."""

    def scaled(net, optimizer, log) -> None:
        steps(net, optimizer, log)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for number in range(3):
            optimizer.zero_grad()
            inputs = torch.ones(1, 3) * (torch.inf if number == 1 else 1.0)  # whose step is left out
            scaler.scale(net(inputs).square().sum()).backward()
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

    return scaled


def a_state_that_is_loaded(net, optimizer, log) -> None:
    steps(net, optimizer, log)
    state = copy.deepcopy(optimizer.state_dict())
    steps(net, optimizer, log)
    optimizer.load_state_dict(state)
    steps(net, optimizer, log)


def a_compiled_update(net, optimizer, log) -> None:
    def update(inputs):
        net(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    update = torch.compile(update, backend="eager")
    for number in range(4):
        update(torch.full((4, 3), 0.1 * number))


IDIOMS = {
    "weight decay": option(weight_decay=0.3),
    "AMSGrad": option(amsgrad=True),
    "maximise": option(maximize=True),
    "decoupled weight decay": option(weight_decay=0.3, decoupled_weight_decay=True),
    "not fused": option(fused=False, foreach=False),
    "betas": option(betas=(0.5, 0.7), eps=0.1),
    "a scaler": grad_scaler(unscales=False),
    "a scaler that unscales": grad_scaler(unscales=True),
    "a global hook before": global_hook(register_optimizer_step_pre_hook),
    "a global hook after": global_hook(register_optimizer_step_post_hook),
} | {
    x.__name__.replace("_", " "): x
    for x in (steps, frozen_in_mid_run, a_gradient_that_is_missing, gradients_that_add_up, zeros_in_place_of_none)
    + (none_by_default, another_rate, a_rate_in_a_tensor, a_group_added, a_parameter_replaced, a_closure, hooks)
    + (a_hook_after, a_copy_with_hooks, a_scheduler, a_state_that_is_loaded, a_compiled_update)
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_every_idiom_does_what_it_does_in_pytorch(idiom):
    results = []
    for lean in (False, True):
        net, log = network(), []
        optimizer = torch.optim.Adam(net.parameters(), 0.05, fused=True)
        optimizer = dqn.lean(optimizer) if lean else optimizer
        IDIOMS[idiom](net, optimizer, log)
        state = [{k: x.tolist() for k, x in optimizer.state[p].items()} for p in net.parameters()]
        results.append(([p.tolist() for p in net.parameters()], state, log))
    ours, theirs = results
    assert ours == theirs
    assert ours[0] != [p.tolist() for p in network().parameters()]


def test_an_ordinary_step_is_the_lean_one(monkeypatch):
    """From the second on: the first makes Adam's state."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 0.05, fused=True)
    dqn.lean(optimizer)
    step(net, optimizer, 0)
    monkeypatch.setattr(torch.optim.Adam, "step", None)
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", None)
    step(net, optimizer, 1)


class Mine(torch.optim.Adam):
    """Somebody's own."""


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, Mine])
def test_adam_becomes_lean_and_nothing_else(kind):
    optimizer = kind(network().parameters())
    assert dqn.lean(optimizer) is optimizer
    assert type(optimizer) is (dqn.LeanAdam if kind is torch.optim.Adam else kind)

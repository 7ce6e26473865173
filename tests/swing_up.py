"""The best returns on Pendulum-v1 by dynamic programming on a grid, against which planners are held."""

import functools

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

STEPS, ANGLES, SPEEDS, TORQUES = 200, 301, 301, 21


def step(angle: Tensor, speed: Tensor, torque: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angle and speed after a step, and its cost, as gymnasium defines them."""
    cost = (torch.remainder(angle + np.pi, 2 * np.pi) - np.pi) ** 2 + 0.1 * speed**2 + 0.001 * torque**2
    speed = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
    return angle + speed * 0.05, speed, cost


def interpolated(values: Tensor, angle: Tensor, speed: Tensor) -> Tensor:
    """Bilinear in the grid's values (ANGLES, SPEEDS), going round with the angle."""
    row, column = torch.remainder(angle + np.pi, 2 * np.pi) / (2 * np.pi) * ANGLES, (speed + 8) / 16 * (SPEEDS - 1)
    i, j = row.floor().long(), column.floor().long().clamp(0, SPEEDS - 2)
    right, below = row - i, column - j
    upper, lower = ((1 - below) * values[k % ANGLES, j] + below * values[k % ANGLES, j + 1] for k in (i, i + 1))
    return (1 - right) * upper + right * lower


@functools.cache
def costs_to_go() -> list[Tensor]:
    """Of every step of an episode, then zeros: (ANGLES, SPEEDS) each; half a minute."""
    angles, speeds = torch.arange(ANGLES) / ANGLES * 2 * np.pi - np.pi, torch.linspace(-8, 8, SPEEDS)
    grid = torch.meshgrid(angles, speeds, indexing="ij")
    values = [torch.zeros(ANGLES, SPEEDS)]
    for _ in range(STEPS):
        options = (step(*grid, torque) for torque in torch.linspace(-2, 2, TORQUES))
        values.append(functools.reduce(torch.minimum, (c + interpolated(values[-1], a, s) for a, s, c in options)))
    return values[::-1]


def best_return(seed: int) -> float:
    """Of the grid's policy in the environment: from the values one step ahead, over 401 torques."""
    env, total, torques = gym.make("Pendulum-v1"), 0.0, torch.linspace(-2, 2, 401)
    env.reset(seed=seed)
    for values in costs_to_go()[1:]:
        angle, speed, cost = step(*torch.tensor(env.unwrapped.state, dtype=torch.float32), torques)
        best = torques[(cost + interpolated(values, angle, speed)).argmin()]
        total += env.step(best.numpy()[None])[1]
    return float(total)

"""Markov decision processes as tables, table[s][a] = rows (p, s', r, done), and as environments."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete
from policy_iteration import Model, model_of, modified_policy_iteration


def random_table(seed: int, states: int = 12, actions: int = 3, end: float = 0.1) -> dict:
    """Up to three successors of a state and action, some of them at the end, with rewards of their own."""
    rng = np.random.default_rng(seed)

    def row() -> list[tuple]:
        p = rng.dirichlet(np.ones(rng.integers(1, 4)))
        return [(x, int(rng.integers(states)), rng.normal(), bool(rng.random() < end)) for x in p]

    return {s: {a: row() for a in range(actions)} for s in range(states)}


def chain_of_the_notes() -> dict:
    """Five states in a line, left and right: −1 a step, −10 from the third to the fourth; the fifth ends at no cost."""
    move = lambda s, a: (1.0, max(s - 1, 0) if a == 0 else s + 1, -10.0 if (s, a) == (2, 1) else -1.0, False)  # noqa: E731
    return {s: {a: [move(s, a)] for a in range(2)} for s in range(4)} | {
        4: {a: [(1.0, 4, 0.0, True)] for a in range(2)}
    }


def table_of(env_id: str) -> dict:
    return gym.make(env_id).unwrapped.P


def model(table: dict) -> Model:
    return model_of(table, len(table), len(table[0]))


def optimal(table: dict, gamma: float) -> np.ndarray:
    """V* (S,) to rounding: values of policy iteration's last policy."""
    iterates = modified_policy_iteration(model(table), gamma, "exact")
    return next(values for values, _, difference in iterates if np.abs(difference).max() < 1e-10)


def register(table: dict, anywhere: bool = False, **kwargs) -> str:
    """The id of an environment with this table, which begins in state 0, or anywhere."""

    class Table(gym.Env):
        def __init__(self, render_mode=None):
            self.P, self.render_mode = table, render_mode
            self.observation_space, self.action_space = Discrete(len(table)), Discrete(len(table[0]))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.state = int(self.np_random.integers(len(table))) if anywhere else 0
            return self.state, {}

        def step(self, action):
            rows = table[self.state][int(action)]
            _, self.state, reward, done = rows[self.np_random.choice(len(rows), p=[x[0] for x in rows])]
            return self.state, reward, done, False, {}

    gym.registry.pop("Table-v0", None)
    gym.register("Table-v0", Table, **kwargs)
    return "Table-v0"

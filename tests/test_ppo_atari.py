"""algos/ppo_atari.py: the emulator's contracts, the two protocols, and whole updates against SB3's with CnnPolicy."""

import gymnasium as gym
import numpy as np
import ppo_atari
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from parity import Recorder, assert_advantages_agree, follow, largest_difference
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def parse(flags: str):
    return ppo_atari.parse_args(flags.split())


# The environments -------------------------------------------------------------------------------------------


def play(envs, steps: int, seed: int = 0) -> list[tuple]:
    """What the environments give for random actions."""
    rng = np.random.default_rng(seed)
    envs.reset(seed)
    return [envs.step(torch.as_tensor(rng.integers(envs.action_space.n, size=envs.num_envs))) for _ in range(steps)]


@pytest.mark.parametrize("protocol", ["machado", "nature"])
def test_the_observation_reached_is_the_final_one_and_the_next_game_has_begun(protocol):
    """Against the emulator's other mode, in which a step by itself begins a game: up to the end it is the same game."""
    args = parse(f"--env-id ALE/Klax-v5 --protocol {protocol}")
    ours = play(ppo_atari.PixelEnvs(args, 2), 300)
    nature = protocol == "nature"
    other = gym.make_vec(
        args.env_id,
        2,
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
        repeat_action_probability=0.0 if nature else 0.25,
        noop_max=30 if nature else 0,
        use_fire_reset=nature,
        reward_clipping=False,
    )
    rng = np.random.default_rng(0)
    other.reset(seed=0)
    for n in range(2):
        end = next(t for t, (*_, terminated, truncated) in enumerate(ours) if terminated[n] or truncated[n])
        assert 50 < end < 299
    ends = np.full(2, -1)
    for t, (obs, reached, rewards, terminated, _) in enumerate(ours):
        actions = rng.integers(other.single_action_space.n, size=2)
        expected, expected_rewards, expected_terminated, _, _ = other.step(actions)
        for n in np.flatnonzero(ends < 0):  # afterwards this mode is a step behind
            assert (reached[n] == expected[n]).all() and rewards[n] == expected_rewards[n]
            assert terminated[n] == expected_terminated[n] and (terminated[n] or (obs[n] == reached[n]).all())
            if terminated[n]:
                assert (obs[n] != reached[n]).any(), "the next game's first observation"
                ends[n] = t
        if (ends >= 0).all():
            return
    pytest.fail("no game ended")


def test_observations_are_not_overwritten_by_later_steps():
    steps = play(ppo_atari.PixelEnvs(parse("--env-id ALE/Breakout-v5"), 2), 30)
    copies = [obs.copy() for obs, *_ in steps]
    for (obs, *_), copy in zip(steps, copies):
        assert (obs == copy).all()
    for (before, *_), (after, *_) in zip(steps, steps[1:]):
        assert before is not after and (after[:, :3] == before[:, 1:]).all(), "the newest image comes last"


@pytest.mark.parametrize("protocol, sticky", [("machado", True), ("nature", False)])
def test_actions_stick_under_machados_protocol_alone(protocol, sticky):
    """Breakout's paddle under alternating commands: two emulators with other seeds stay alike, or do not."""
    envs = ppo_atari.PixelEnvs(parse(f"--env-id ALE/Breakout-v5 --protocol {protocol}"), 2)
    envs.reset(5)
    envs.envs.reset(seed=np.array([5, 5]))
    alike = []
    for t in range(20):
        obs, *_ = envs.step(torch.tensor([2 + t % 2] * 2))
        alike.append((obs[0, -1] == obs[1, -1]).all())
    assert all(alike), "one seed, one game"
    envs.envs.reset(seed=np.array([5, 6]))
    frames = [envs.step(torch.tensor([2 + t % 2] * 2))[0][:, -1, 70:] for t in range(40)]
    paddles_differ = np.mean([(a != b).any() for a, b in frames])
    assert (paddles_differ > 0.5) == sticky, paddles_differ


SMALL = "--num-minibatches 1 --update-epochs 1 --torch-threads 1 --eval-episodes 1 --num-envs 2"


@pytest.fixture
def seen(monkeypatch):
    """Every rollout's arguments of gae; nothing is evaluated, as a paddle that never serves takes 27 000 steps."""
    calls, gae = [], ppo_atari.gae
    monkeypatch.setattr(ppo_atari, "gae", lambda *args: calls.append(args) or gae(*args))
    monkeypatch.setattr(ppo_atari, "evaluate", lambda *_, **__: np.zeros(1))
    return calls


def test_a_lost_life_is_a_termination_for_learning_under_natures_protocol_alone(seen):
    """In Breakout five lives are a game; what is logged are games under both."""
    ends = {}
    for protocol in ("machado", "nature"):
        seen.clear()
        flags = f"--env-id ALE/Breakout-v5 --protocol {protocol} --total-timesteps 1024 --num-steps 256 {SMALL}"
        run = ppo_atari.train(parse(flags))
        games = np.loadtxt(run["run_dir"] / "monitor.csv", delimiter=",", skiprows=2, ndmin=2)
        assert (games[:, 1] > 80).all(), "five lives take more than eighty steps"
        ends[protocol] = sum(terminated.sum().item() for *_, terminated, _, _, _ in seen), len(games)
    assert ends["machado"][0] == ends["machado"][1] > 2
    lost, games = ends["nature"]
    assert games > 2 and 5 * games <= lost <= 5 * games + 2 * 4, "four lives that the game goes on after, then its end"


def test_scores_are_the_games_and_learning_sees_their_signs(seen, monkeypatch):
    step = ppo_atari.PixelEnvs.step

    def richer(envs, actions):
        obs, reached, rewards, *rest = step(envs, actions)
        return obs, reached, 7 * rewards, *rest

    monkeypatch.setattr(ppo_atari.PixelEnvs, "step", richer)
    for extra, expected in (("", {0.0, 1.0}), ("--no-clip-rewards", {0.0, 7.0})):
        seen.clear()
        ppo_atari.train(parse(f"--env-id ALE/Breakout-v5 --total-timesteps 512 --num-steps 256 {SMALL} {extra}"))
        assert set(torch.cat([rewards for rewards, *_ in seen]).unique().tolist()) == expected


def test_an_evaluation_plays_whole_games_for_their_scores():
    """Of a policy that serves and then moves to and fro, against the emulator by itself."""

    class Restless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.steps = torch.nn.Parameter(torch.zeros(1)), 0

        def forward(self, obs):
            self.steps += 1
            return torch.full((len(obs),), [1, 2, 2, 3, 3][self.steps % 5])

    args = parse("--env-id ALE/Breakout-v5 --eval-episodes 3")
    scores = ppo_atari.evaluate(Restless(), args, ppo_atari.PixelEnvs)
    envs = gym.make_vec(
        args.env_id, 3, repeat_action_probability=0.25, noop_max=0, reward_clipping=False, use_fire_reset=False
    )
    envs.reset(seed=args.seed + 1_000_000)
    policy, expected, running = Restless(), np.zeros(3), np.ones(3, bool)
    while running.any():
        _, rewards, terminated, truncated, _ = envs.step(policy(torch.zeros(3)).numpy())
        expected += rewards * running
        running &= ~(terminated | truncated)
    assert scores.tolist() == expected.tolist() and scores.max() > 0


def test_a_time_limit_is_bootstrapped_from_its_final_observation(seen, monkeypatch):
    networks, reached = [], []

    class Envs(ppo_atari.PixelEnvs):
        def __init__(self, args, num_envs):
            super().__init__(args, num_envs, max_episode_steps=20)

        def step(self, actions):
            result = super().step(actions)
            reached.append(result[1].copy())
            return result

    class Network(ppo_atari.PixelActorCritic):
        def __init__(self, *spaces):
            super().__init__(*spaces)
            networks.append(self)

    monkeypatch.setattr(ppo_atari, "PixelEnvs", Envs)
    monkeypatch.setattr(ppo_atari, "PixelActorCritic", Network)
    ppo_atari.train(parse(f"--env-id ALE/Pong-v5 --total-timesteps 100 --num-steps 50 {SMALL} --learning-rate 1e-30"))
    ((_, values, next_values, terminated, truncated, _, _),) = seen
    assert not terminated.any() and truncated.sum() == 4 and truncated[19].all() and truncated[39].all()
    with torch.no_grad():
        expected = torch.stack([networks[0].logits_and_values(torch.as_tensor(x))[1] for x in reached])
    torch.testing.assert_close(next_values, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(next_values[:-1][~truncated[:-1]], values[1:][~truncated[:-1]])
    assert ((next_values[19] - values[20]).abs() > 1e-4).all()


# The maths --------------------------------------------------------------------------------------------------


IMAGES, ACTIONS = Box(0, 255, (2, 36, 36), np.uint8), Discrete(3, start=5)


def test_samples_follow_the_policy(monkeypatch):
    actions = []

    def constant(agent, images):
        return torch.tensor([2.0, 0.0, -1.0]).expand(len(images), 3), torch.zeros(len(images))

    def recorded(agent, batch, clip, args):
        actions.append(batch.actions)
        return {"approx_kl": torch.zeros(())}

    monkeypatch.setattr(ppo_atari.PixelActorCritic, "logits_and_values", constant)
    monkeypatch.setattr(ppo_atari, "pixel_ppo_gradient", recorded)
    monkeypatch.setattr(ppo_atari, "export_policy", lambda *_: None)
    flags = "--num-steps 1000 --num-envs 4 --total-timesteps 8000 --num-minibatches 1 --update-epochs 1"
    ppo_atari.train(parse(f"--env-id Catch-v0 {flags} --eval-episodes 1"))
    frequencies = torch.cat(actions).bincount(minlength=3) / 8_000
    torch.testing.assert_close(frequencies, torch.tensor([2.0, 0.0, -1.0]).softmax(-1), atol=0.02, rtol=0)


def test_the_network_sees_intensities_and_acts_in_the_space():
    """Of an image from 0 to 255, [0, 1]; the most likely action is counted from the space's start."""
    torch.manual_seed(0)
    agent, obs = ppo_atari.PixelActorCritic(IMAGES, ACTIONS), torch.randint(256, (6, 2, 36, 36), dtype=torch.uint8)
    with torch.no_grad():
        logits, values = agent.logits_and_values(obs)
        features = agent.trunk(obs.float() / 255)
        torch.testing.assert_close(logits, agent.actor(features), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values, agent.critic(features).squeeze(1), rtol=1e-4, atol=1e-6)
        assert agent(obs).tolist() == (5 + logits.argmax(1)).tolist()


def minibatch(size: int = 16):
    """A network and numbers to learn from."""
    torch.manual_seed(0)
    agent = ppo_atari.PixelActorCritic(IMAGES, ACTIONS)
    images = torch.randint(256, (size, 2, 36, 36), dtype=torch.uint8)
    actions, advantages, returns = torch.randint(3, (size,)), torch.randn(size), torch.randn(size)
    with torch.no_grad():
        logits, values = agent.logits_and_values(images)
        log_probs = torch.distributions.Categorical(logits=logits).log_prob(actions)
    old_values = values + torch.linspace(-0.5, 0.5, size)
    old_log_probs = log_probs + torch.linspace(-0.3, 0.3, size)
    return agent, ppo_atari.PixelBatch(images, actions, old_log_probs, old_values, advantages, returns)


@pytest.mark.parametrize("settings", [{}, dict(clip_value=0.1), dict(normalize_advantages=False, ent_coef=0.5)])
def test_the_loss_is_the_papers(settings):
    """Sample by sample, with PyTorch's own distribution."""
    args = ppo_atari.Args(**settings)
    agent, batch = minibatch()
    loss, metrics = ppo_atari.pixel_ppo_loss(agent, batch, 0.2, args)
    logits, values = agent.logits_and_values(batch.observations)
    policy = torch.distributions.Categorical(logits=logits)
    ratios = (policy.log_prob(batch.actions) - batch.log_probs).exp()
    advantages = batch.advantages
    if args.normalize_advantages:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = [min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, advantages)]
    within = args.clip_value or torch.inf
    errors = [
        (old + min(max(v - old, -within), within) - y) ** 2 if args.clip_value else (v - y) ** 2
        for v, old, y in zip(values, batch.values, batch.returns)
    ]
    expected = dict(policy_loss=-sum(clipped) / 16, value_loss=sum(errors) / 16, entropy=policy.entropy().mean())
    expected["approx_kl"] = (ratios - 1 - ratios.log()).mean()
    expected["clipfrac"] = sum(abs(r - 1) > 0.2 for r in ratios) / 16
    assert 0 < expected["clipfrac"] < 1 and metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.float().detach(), rtol=1e-4, atol=1e-6)
    total = expected["policy_loss"] + 0.5 * expected["value_loss"] - args.ent_coef * expected["entropy"]
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_losses_up_to_its_bound_and_lies_as_the_parameters_do():
    """Fused Adam reads a gradient in its memory's order, and a convolution's of channels-last images has another."""
    agent, batch = minibatch()
    for bound in (1e9, 0.1):
        args = ppo_atari.Args(max_grad_norm=bound)
        expected = torch.autograd.grad(ppo_atari.pixel_ppo_loss(agent, batch, 0.2, args)[0], list(agent.parameters()))
        norm = torch.cat([x.flatten() for x in expected]).norm()
        agent.zero_grad()
        ppo_atari.pixel_ppo_gradient(agent, batch, 0.2, args)
        for parameter, gradient in zip(agent.parameters(), expected):
            assert parameter.grad.stride() == parameter.stride()
            torch.testing.assert_close(parameter.grad, gradient * min(1, bound / norm), rtol=1e-4, atol=1e-7)
    assert norm > 0.1


@pytest.fixture
def gradients(monkeypatch):
    """For each minibatch the clipping range, and for each step of Adam its learning rate."""
    clips, rates, gradient = [], [], ppo_atari.pixel_ppo_gradient

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    def recorded(agent, batch, clip, args):
        clips.append(clip.item())
        return gradient(agent, batch, clip, args)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(ppo_atari, "pixel_ppo_gradient", recorded)
    return clips, rates


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rate_and_clipping_range_fall_linearly_if_asked_for(anneal, gradients):
    flags = "--env-id OneStateImage-v0 --num-envs 2 --num-steps 5 --num-minibatches 1 --update-epochs 1"
    no = "" if anneal else "no-"
    flags += " --total-timesteps 40 --torch-threads 1 --eval-episodes 1 --learning-rate 0.01 --clip-coef 0.3"
    flags += f" --{no}anneal-lr --{no}anneal-clip"
    ppo_atari.train(parse(flags))
    shares = np.array([1, 0.75, 0.5, 0.25] if anneal else [1] * 4)
    np.testing.assert_allclose(gradients, [0.3 * shares, 0.01 * shares], rtol=1e-6)


def test_an_update_ends_where_the_kl_passes_its_target(gradients):
    """The policy has moved since the rollout: no step more with a target below that, and the epochs are over."""
    flags = "--env-id OneStateImage-v0 --num-envs 2 --num-steps 8 --num-minibatches 1 --update-epochs 9"
    for target, minibatches, steps in (("", 9, 9), ("--target-kl 1e-9", 2, 1)):
        for numbers in gradients:
            numbers.clear()
        ppo_atari.train(parse(f"{flags} --total-timesteps 16 --torch-threads 1 --eval-episodes 1 {target}"))
        assert [len(numbers) for numbers in gradients] == [minibatches, steps]


# Against Stable-Baselines3 ----------------------------------------------------------------------------------


def copy_cnn_weights(policy, agent):
    """SB3's ActorCriticCnnPolicy → PixelActorCritic; returns the agent."""
    theirs = [*policy.features_extractor.cnn, *policy.features_extractor.linear]
    for ours, other in zip(agent.trunk, theirs, strict=True):
        ours.load_state_dict(other.state_dict())
    agent.actor.load_state_dict(policy.action_net.state_dict())
    agent.critic.load_state_dict(policy.value_net.state_dict())
    return agent


def test_update_parity_with_sb3(monkeypatch, record_property):
    """Three rollouts through SB3's own train() and through ours: same weights, same images, same minibatch order."""
    T, N, iterations = 32, 4, 3
    args = ppo_atari.Args(num_envs=N, num_steps=T, num_minibatches=2, update_epochs=3, learning_rate=1e-3)
    env = Recorder(DummyVecEnv([lambda n=n: gym.make("Catch-v0", max_episode_steps=4 + n) for n in range(N)]))
    model = PPO(
        "CnnPolicy",
        env,
        learning_rate=args.learning_rate,
        n_steps=T,
        batch_size=T * N // args.num_minibatches,
        n_epochs=args.update_epochs,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        policy_kwargs=dict(optimizer_kwargs=dict(eps=1e-5)),
        seed=0,
        device="cpu",
    )
    spaces = env.observation_space, env.action_space
    agent = copy_cnn_weights(model.policy, ppo_atari.PixelActorCritic(*spaces))
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    permutation, orders = np.random.permutation, []
    monkeypatch.setattr(np.random, "permutation", lambda n: orders.append(permutation(n)) or orders[-1])

    def update(obs, next_obs, actions, rewards, terminated, truncated):
        with torch.no_grad():
            logits, values = agent.logits_and_values(obs.flatten(0, 1))
            _, next_values = agent.logits_and_values(next_obs.flatten(0, 1))
            log_probs, _ = ppo_atari.categorical_log_prob_and_entropy(logits, actions.flatten())
        values, next_values = values.view(T, N), next_values.view(T, N)
        advantages = ppo_atari.gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
        assert_advantages_agree(model, advantages)
        batch = (obs, actions, log_probs.view(T, N), values, advantages, advantages + values)
        batch = [x.flatten(0, 1) for x in batch]
        for order in orders:
            order = torch.as_tensor(order % T * N + order // T)  # SB3 counts its samples environment by environment
            for indices in order.chunk(args.num_minibatches):
                optimizer.zero_grad()
                part = ppo_atari.PixelBatch(*(x[indices] for x in batch))
                ppo_atari.pixel_ppo_gradient(agent, part, args.clip_coef, args)
                optimizer.step()
        orders.clear()

    follow(model, T * N * iterations, update)
    reference = copy_cnn_weights(model.policy, ppo_atari.PixelActorCritic(*spaces))
    worst = largest_difference(agent, reference, before)
    record_property("relative difference", worst)
    print(f"largest relative difference of a parameter {worst:.1e}")
    assert worst < 1e-5


def test_both_networks_start_from_the_same_distribution():
    """Gains and biases of SB3's, layer by layer."""
    model = PPO("CnnPolicy", DummyVecEnv([lambda: gym.make("Catch-v0")]), device="cpu")
    ours = ppo_atari.PixelActorCritic(model.observation_space, model.action_space)
    theirs = copy_cnn_weights(model.policy, ppo_atari.PixelActorCritic(model.observation_space, model.action_space))
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.norm(), y.norm(), rtol=1e-4, atol=1e-6)


# Learning ---------------------------------------------------------------------------------------------------


ONE_STATE = "--num-envs 4 --num-minibatches 1 --update-epochs 2 --no-anneal-lr --max-grad-norm 1000 --gae-lambda 1"
ONE_STATE += " --learning-rate 1e-3 --total-timesteps 10000 --torch-threads 1 --eval-episodes 1"


@pytest.mark.parametrize(
    "env_id, num_steps, value, tolerance",
    [
        ("OneStateImage-v0", 10, 100, 5),
        ("OneStateTerminalImage-v0", 40, np.mean([(1 - 0.99**k) / 0.01 for k in range(1, 11)]), 0.5),
    ],
)
def test_a_time_limit_is_bootstrapped_and_a_termination_is_not(env_id, num_steps, value, tolerance):
    """As in tests/test_learning.py."""
    run = ppo_atari.train(parse(f"--env-id {env_id} --num-steps {num_steps} {ONE_STATE}"))
    events = EventAccumulator(str(run["run_dir"]), {"scalars": 0}).Reload()
    assert events.Scalars("losses/values")[-1].value == pytest.approx(value, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_learns_to_catch_from_pixels(seed):
    flags = f"--env-id Catch-v0 --seed {seed} --total-timesteps 30000 --learning-rate 1e-3 --torch-threads 1"
    assert ppo_atari.train(parse(f"{flags} --eval-episodes 100"))["returns"].mean() >= 0.9

"""What train() of the off-policy scripts does: what it stores, when it updates, how it explores, that it learns."""

import importlib
import json

import ddpg
import dqn
import gymnasium as gym
import numpy as np
import pytest
import sac
import td3
import torch
from gymnasium.spaces import Box, Discrete

ALGOS = (dqn, ddpg, td3, sac)
CONTINUOUS = (ddpg, td3, sac)
each_algo = pytest.mark.parametrize("algo", ALGOS, ids=lambda algo: algo.__name__)
each_continuous = pytest.mark.parametrize("algo", CONTINUOUS, ids=lambda algo: algo.__name__)

BOUNDS = Box(np.array([-3, 0], np.float32), np.array([1, 0.5], np.float32))
ACTIONS = {"discrete": Discrete(3, start=2), "box": BOUNDS}


class Diary(gym.Env):
    """Every observation and reward is unique; episodes end by themselves, by turns terminated and truncated."""

    observation_space = Box(-np.inf, np.inf, (3,))
    logs: list[list] = []

    def __init__(self, action):
        self.action_space, self.number, self.episode, self.log = ACTIONS[action], len(self.logs), 0, []
        self.logs.append(self.log)

    def observe(self):
        return np.array([self.number, self.episode, self.t], np.float32) / 10

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        before = self.observe()
        self.t += 1
        reward = 100.0 * self.number + self.episode + self.t / 10
        ends = self.t == 5 and self.episode % 2 == 0, self.t == 7
        self.log.append((before, np.array(action), reward, self.observe(), *ends))
        return self.observe(), reward, *ends, {}


class Bandit(gym.Env):
    """Episodes of one step: the best action depends on the observation, in its whole range."""

    observation_space = Box(-1, 1, (1,))

    def __init__(self, action):
        self.action_space = ACTIONS[action]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        if isinstance(self.action_space, Discrete):
            best = 2 + int((self.obs[0] + 1) / 2 * 3)
            return self.obs.copy(), float(action == best), True, False, {}
        wanted = BOUNDS.low + (self.obs + 1) / 2 * (BOUNDS.high - BOUNDS.low)
        reward = 1 - np.abs((action - wanted) / (BOUNDS.high - BOUNDS.low)).mean()
        return self.obs.copy(), float(reward), True, False, {}


for action in ACTIONS:
    gym.register(f"Diary{action}-v0", Diary, kwargs={"action": action})
    gym.register(f"Bandit{action}-v0", Bandit, kwargs={"action": action})


def environment(algo, name):
    return f"{name}{'discrete' if algo is dqn else 'box'}-v0"


def train(algo, flags):
    return algo.train(algo.parse_args(flags.split()))


def diary_run(algo, flags):
    """A run in two diaries → its checkpoint, and what each environment has seen, field by field."""
    Diary.logs.clear()
    common = "--num-envs 2 --total-timesteps 400 --buffer-size 1000 --batch-size 8 --hidden-sizes 16 --eval-episodes 1"
    result = train(algo, f"--env-id {environment(algo, 'Diary')} {common} {flags}")
    checkpoint = torch.load(result["run_dir"] / "checkpoint.pt", weights_only=True)
    logs = Diary.logs[:2]  # later ones are the evaluation's
    assert [len(log) for log in logs] == [200, 200]
    return checkpoint, [[np.array(field) for field in zip(*log)] for log in logs]


def make_agent(algo, state, num_critics=2):
    """The script's network for a diary, with a checkpoint's weights."""
    spaces = Diary.observation_space, ACTIONS["discrete" if algo is dqn else "box"]
    networks = {dqn: "QNetwork", ddpg: "DeterministicActorCritic", td3: "DeterministicActorCritics"}
    critics = [num_critics] if algo in (td3, sac) else []
    agent = getattr(algo, networks.get(algo, "SoftActorCritics"))(*spaces, (16,), *critics)
    agent.load_state_dict(state)
    return agent


# What goes into the buffer ----------------------------------------------------------------------------------


@each_algo
def test_the_buffer_holds_what_the_environments_saw(algo):
    """At both kinds of end too: the next observation is the one reached, not the next episode's first."""
    explore = {dqn: "--exploration-end 0.5", sac: ""}.get(algo, "--exploration-noise 2")
    checkpoint, logs = diary_run(algo, f"--learning-starts 100 {explore}")
    buffer, agent = checkpoint["buffer"], make_agent(algo, checkpoint["network" if algo is dqn else "agent"])
    for k, (obs, actions, rewards, next_obs, terminated, truncated) in enumerate(logs):
        rows = {name: x[k::2].numpy() for name, x in buffer.items() if name != "position"}
        np.testing.assert_array_equal(rows["observations"], obs)
        np.testing.assert_array_equal(rows["next_observations"], next_obs)
        np.testing.assert_array_equal(rows["rewards"], rewards.astype(np.float32))
        np.testing.assert_array_equal(rows["terminated"], terminated)
        truncated[-1] = not terminated[-1]  # a resumed run begins a new episode
        np.testing.assert_array_equal(rows["truncated"], truncated)
        assert terminated.sum() > 10 and truncated.sum() > 10
        np.testing.assert_array_equal(agent.to_env(torch.as_tensor(rows["actions"])).numpy(), actions)
        if algo is not dqn:
            assert abs(rows["actions"]).max() <= 1, "actions in the buffer are those in [−1, 1]"


@each_algo
def test_explores_at_random_first_and_then_around_its_policy(algo):
    """With hardly a learning rate the policy stays what the checkpoint holds, so every action can be told."""
    quiet = {dqn: "--exploration-start 0 --exploration-end 0", sac: ""}.get(algo, "--exploration-noise 0")
    checkpoint, _ = diary_run(algo, f"--learning-starts 200 --learning-rate 1e-30 {quiet}")
    buffer, agent = checkpoint["buffer"], make_agent(algo, checkpoint["network" if algo is dqn else "agent"])
    early, late, obs = buffer["actions"][:200], buffer["actions"][200:], buffer["observations"]
    with torch.no_grad():
        if algo is dqn:
            assert (early.bincount(minlength=3) - 200 / 3).abs().max() < 5 * (200 * 2 / 9) ** 0.5
            assert torch.equal(late, agent.q_values(obs[200:]).argmax(-1))
            return
        assert early.abs().max() <= 1 and early.min() < -0.9 and early.max() > 0.9
        assert early.std().item() == pytest.approx(3**-0.5, abs=0.06)
        if algo is not sac:
            torch.testing.assert_close(late, agent.actor(obs[200:]))
            return
        mean, log_std = agent.policy(obs[200:])
        noise = (late.atanh() - mean) / log_std.exp()
        assert noise.mean().item() == pytest.approx(0, abs=0.25) and noise.std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("algo", [ddpg, td3], ids=lambda algo: algo.__name__)
@pytest.mark.parametrize("noise, theta", [("gaussian", 1.0), ("ou", 0.15)])
def test_exploration_noise_starts_anew_with_each_episode_in_its_own_environment(algo, noise, theta, monkeypatch):
    calls = []

    def recorded(previous, gaussian, sigma, theta):
        calls.append((previous.clone(), sigma, theta))
        return torch.ones_like(previous)

    monkeypatch.setattr(algo, "ornstein_uhlenbeck", recorded)
    checkpoint, _ = diary_run(algo, f"--learning-starts 100 --noise {noise} --exploration-noise 0.31")
    assert len(calls) == 150 and {(sigma, theta) for _, sigma, theta in calls} == {(0.31, theta)}
    ends = (checkpoint["buffer"]["terminated"] | checkpoint["buffer"]["truncated"]).view(200, 2)
    for step, (previous, *_) in enumerate(calls[1:], start=51):
        expected = (~ends[step - 1]).float().unsqueeze(1).expand(2, 2)
        assert torch.equal(previous, expected), step


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_dqns_exploration_falls_linearly(exploration, monkeypatch):
    calls = []
    for name in ("epsilon_greedy", "boltzmann"):
        original = getattr(dqn, name)

        def recorded(q_values, value, name=name, original=original):
            calls.append((name, value))
            return original(q_values, value)

        monkeypatch.setattr(dqn, name, recorded)
    flags = f"--exploration {exploration} --exploration-start 0.9 --exploration-end 0.1 --exploration-fraction 0.5"
    diary_run(dqn, f"--learning-starts 100 {flags}")
    name = "epsilon_greedy" if exploration == "epsilon" else "boltzmann"
    for step, call in zip(range(100, 400, 2), calls, strict=True):
        assert call == (name, pytest.approx(max(0.9 - 0.8 * step / 200, 0.1)))


@pytest.mark.parametrize("anneal", [True, False])
def test_dqns_learning_rate_falls_linearly_if_asked_for(anneal, monkeypatch):
    rates, step = [], dqn.LeanAdam.step

    def recorded(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(dqn.LeanAdam, "step", recorded)
    flags = "--learning-starts 100 --train-frequency 40 --gradient-steps 1 --learning-rate 0.3"
    diary_run(dqn, f"{flags} --{'' if anneal else 'no-'}anneal-lr")
    begun = [80, 160, 240, 320]  # where the iterations with an update begin
    assert rates == [pytest.approx(0.3 * (1 - step / 400) if anneal else 0.3) for step in begun]


def test_dqn_trains_on_n_step_windows(monkeypatch):
    windows, given, gradient = [], [], dqn.dqn_gradient
    n_step_transitions = dqn.n_step_transitions
    monkeypatch.setattr(dqn, "n_step_transitions", lambda *x: windows.append(n_step_transitions(*x)) or windows[-1])
    monkeypatch.setattr(dqn, "dqn_gradient", lambda *x: given.append(x[2:4]) or gradient(*x))
    diary_run(dqn, "--learning-starts 100 --n-step 3 --gamma 0.9")
    assert len(given) == len(windows) > 100
    for (batch, discounts), window in zip(given, windows):
        assert batch is window[0] and discounts is window[1]
    steps = torch.cat([discounts for _, discounts in windows]).log() / np.log(0.9)
    assert set(steps.round().int().tolist()) == {1, 2, 3}


# When it updates --------------------------------------------------------------------------------------------

FLAGS = "--num-envs 2 --train-frequency 3 --gradient-steps 2 --learning-starts 12 --total-timesteps 48 --batch-size 4"
FLAGS += " --buffer-size 1000 --hidden-sizes 8 --eval-episodes 1"

# By letters, what an update does: z forgets gradients, c and p compute those of critics and policy, s takes a step with
# them, t moves the target.
CRITICS = {dqn: "zcs", ddpg: "zcszpst", td3: "zcs", sac: "zcst"}
POLICY = {td3: "zpst", sac: "zzpss"}


@each_algo
def test_updates_come_when_the_flags_say(algo, monkeypatch):
    """a: a step of all environments. Everything that an update returned is logged, each once."""
    events, made, logged = [], [], []

    def event(letter, *names):
        def gradient(*args):
            events.append(letter)
            made.append({name: torch.tensor(100.0 * k + len(events)) for k, name in enumerate(names)})
            return dict(made[-1])

        return gradient

    add, log, name = algo.ReplayBuffer.add, algo.Run.log, algo.__name__
    monkeypatch.setattr(algo.ReplayBuffer, "add", lambda *x: events.append("a") or add(*x))
    monkeypatch.setattr(algo.Run, "log", lambda run, metrics, **x: logged.extend(metrics) or log(run, metrics, **x))
    monkeypatch.setattr(algo.LeanAdam, "zero_grad", lambda optimizer: events.append("z"))
    monkeypatch.setattr(algo.LeanAdam, "step", lambda optimizer: events.append("s"))
    monkeypatch.setattr(algo, "polyak_update", lambda target, online, tau: events.append({0.3: "t"}[tau]))
    critics = "dqn_gradient" if algo is dqn else f"{name}_critic_gradient"
    monkeypatch.setattr(algo, critics, event("c", "critic_loss", "q_values"))
    if algo is not dqn:
        monkeypatch.setattr(algo, f"{name}_actor_gradient", event("p", "actor_loss"))
    flags = f"{FLAGS} --tau 0.3 " + {dqn: "--target-frequency 5", ddpg: ""}.get(algo, "--policy-delay 3")
    train(algo, f"--env-id {environment(algo, 'Diary')} {flags}")

    expected, step, updates = "", 0, 0
    while step < 48:
        for _ in range(3):
            expected += "a"
            step += 2
            if algo is dqn and step // 5 > (step - 2) // 5:
                expected += "t"
        for _ in range(2 if step > 12 else 0):
            updates += 1
            expected += CRITICS[algo] + (POLICY[algo] if algo in POLICY and updates % 3 == 0 else "")
    assert "".join(events) == expected and updates == 12
    if algo is ddpg:  # one dict for both
        made = [critic | actor for critic, actor in zip(made[::2], made[1::2])]
    assert logged == made


@each_algo
def test_a_run_that_would_never_learn_is_refused(algo, capsys):
    flags = FLAGS.replace("--learning-starts 12", "--learning-starts 48")
    with pytest.raises(SystemExit) as exit_:
        train(algo, f"--env-id {environment(algo, 'Diary')} {flags}")
    assert exit_.value.code == 2
    assert "--learning-starts 48 must be below --total-timesteps 48" in capsys.readouterr().err


@each_continuous
def test_products_have_the_precision_asked_for_and_the_same_bits_with_the_same_seed(algo, monkeypatch):
    update, seen = algo.polyak_update, []
    monkeypatch.setattr(
        algo, "polyak_update", lambda *args: seen.append(torch.get_float32_matmul_precision()) or update(*args)
    )
    flags = f"--env-id {environment(algo, 'Bandit')} --total-timesteps 60 --learning-starts 50 --eval-episodes 1"
    agents = []
    for precision in ("medium", "high", "medium", "highest"):
        run_dir = train(algo, f"{flags} --hidden-sizes 32 --matmul-precision {precision}")["run_dir"]
        agents.append(torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"])
        assert set(seen) == {precision}
        seen.clear()
    for name, first in agents[0].items():
        assert torch.equal(first, agents[2][name])
        torch.testing.assert_close(first, agents[3][name], rtol=0.1, atol=0.05)  # bfloat16 has 8 bits


# That it learns ---------------------------------------------------------------------------------------------


@each_algo
def test_learns_which_action_is_best_where(algo):
    flags = "--total-timesteps 1500 --learning-starts 200 --batch-size 64 --hidden-sizes 32 --learning-rate 0.003"
    flags += " --train-frequency 2 --gradient-steps 1 --eval-episodes 200"
    flags += {dqn: " --target-frequency 50", sac: ""}.get(algo, " --exploration-noise 0.3")
    result = train(algo, f"--env-id {environment(algo, 'Bandit')} {flags}")
    assert result["returns"].mean() > 0.85  # no more than 0.5 without looking at the observation
    if algo is sac:
        checkpoint = torch.load(result["run_dir"] / "checkpoint.pt", weights_only=True)
        assert checkpoint["agent"]["log_alpha"].exp() < 0.8, "the temperature did not move"


# The policy that is evaluated and exported ------------------------------------------------------------------


def new_agent(algo, observation_space=Diary.observation_space, action_space=BOUNDS):
    torch.manual_seed(0)
    critics = [2] if algo in (td3, sac) else []
    name = {ddpg: "DeterministicActorCritic", td3: "DeterministicActorCritics", sac: "SoftActorCritics"}[algo]
    return getattr(algo, name)(observation_space, action_space, (64,), *critics)


def test_dqns_policy_is_greedy():
    torch.manual_seed(0)
    network, obs = dqn.QNetwork(Box(-1, 1, (3,)), Discrete(5, start=2), (32,)), torch.randn(100, 3)
    q_values = network.network(obs)
    assert q_values.argmax(1).unique().numel() > 1
    assert network(obs).tolist() == [2 + max(range(5), key=q.__getitem__) for q in q_values.tolist()]


@each_continuous
def test_the_policy_is_the_actor_without_noise_scaled_to_the_bounds(algo):
    agent, obs = new_agent(algo), torch.randn(100, 3)
    with torch.no_grad():
        actions = agent.policy(obs)[0].tanh() if algo is sac else agent.actor(obs)
        expected = torch.as_tensor(BOUNDS.low) + (actions + 1) / 2 * torch.as_tensor(BOUNDS.high - BOUNDS.low)
        torch.testing.assert_close(agent(obs), expected)
    assert actions.std() > 0.01


@each_continuous
def test_actions_are_scaled_to_asymmetric_bounds(algo):
    bounds = Box(np.array([-3, 0, 10], np.float32), np.array([1, 0.5, 1000], np.float32))
    agent = new_agent(algo, action_space=bounds)
    for unscaled, scaled in ((-1, bounds.low), (1, bounds.high), (0, (bounds.low + bounds.high) / 2)):
        np.testing.assert_allclose(agent.to_env(torch.full((3,), float(unscaled))), scaled, rtol=1e-6)
    last = [layer for layer in agent.actor if isinstance(layer, torch.nn.Linear)][-1]
    torch.nn.init.normal_(last.weight, std=100)
    actions = agent(torch.randn(1000, 3)).detach().numpy()
    assert all(bounds.contains(action) for action in actions)
    for bias, bound in ((-1e6, bounds.low), (1e6, bounds.high)):
        last.bias.data.fill_(bias)
        np.testing.assert_array_equal(agent(torch.randn(3)).detach().numpy(), bound)


@each_continuous
def test_states_of_discrete_and_uint8_observations(algo):
    assert new_agent(algo, Discrete(4, start=2)).encode(torch.tensor([2, 5])).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    pixels = new_agent(algo, Box(0, 255, (3,), np.uint8))
    assert pixels.encode(torch.tensor([[0, 1, 255]], dtype=torch.uint8)).tolist() == [[0.0, 1.0, 255.0]]


def test_q_values_of_discrete_and_uint8_observations():
    torch.manual_seed(0)
    network = dqn.QNetwork(Discrete(4, start=2), Discrete(3), (8,))
    torch.testing.assert_close(network.q_values(torch.tensor([2, 5])), network.network(torch.eye(4)[[0, 3]]))
    pixels = dqn.QNetwork(Box(0, 255, (3,), np.uint8), Discrete(3), (8,))
    obs = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    torch.testing.assert_close(pixels.q_values(obs), pixels.network(obs.float()))


@pytest.mark.parametrize("algo", ["ddpg", "td3", "sac", "mbpo"])
@pytest.mark.parametrize(
    "about, exact, device, chosen",
    [
        ("vendor_id : AuthenticAMD\ncpu family : 26\n", True, "auto", "medium"),
        ("vendor_id : AuthenticAMD\ncpu family : 26\n", False, "cpu", "highest"),
        ("vendor_id : AuthenticAMD\ncpu family : 26\n", True, "cuda", "highest"),
        ("vendor_id : AuthenticAMD\ncpu family : 25\n", True, "cpu", "highest"),
        ("vendor_id : GenuineIntel\ncpu family : 26\n", True, "cpu", "highest"),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", True, "cpu", "medium"),  # as Windows has it
        ("", True, "cpu", "highest"),
    ],
)
def test_products_are_taken_by_what_is_faster_and_exact(monkeypatch, capsys, algo, about, exact, device, chosen):
    """Float32 products here are exact, or of rounded factors; the processor is the one that `about` describes."""
    script, product = importlib.import_module(algo), torch.Tensor.__matmul__

    def product_there(x, y):
        if x.dtype == torch.float32:
            x, y = (a.double() if exact else a.bfloat16().double() for a in (x, y))
        return product(x, y)

    def read_text(path):
        if "Family" in about or not about:
            raise FileNotFoundError(path)
        return about

    monkeypatch.setattr(torch.Tensor, "__matmul__", product_there)
    monkeypatch.setattr(script.Path, "read_text", read_text)
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", about)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_float32_matmul_precision()
    assert script.settle(script.Args(device=device)) == script.Args(device=device, matmul_precision=chosen)
    assert torch.get_float32_matmul_precision() == before
    assert capsys.readouterr().out == f"auto: --torch-threads 1 --matmul-precision {chosen}\n"
    asked = script.Args(matmul_precision="high")
    assert script.settle(asked) == asked and not capsys.readouterr().out


@each_continuous
def test_the_number_of_threads_is_that_which_is_fastest(monkeypatch, algo):
    """Of 1, 2, 4 of six cores; here a product's milliseconds depend on it alone. Afterwards it is as it was."""
    product, milliseconds, spent = torch.Tensor.__matmul__, {1: 3, 2: 1, 4: 2}, []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *x: spent.append(milliseconds[seen[-1]]) or product(*x))
    monkeypatch.setattr(algo.time, "perf_counter", lambda: sum(spent) / 1e3)
    monkeypatch.setattr(algo.os, "cpu_count", lambda: 6)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    args = algo.settle(algo.Args(torch_threads="auto", matmul_precision="highest"))
    assert args.torch_threads == 2 and {*seen} == {1, 2, 4, before} and seen[-1] == before


@each_continuous
def test_what_auto_stands_for_is_kept(monkeypatch, algo, capsys):
    """In args.json and for --resume, which goes on with it wherever it is."""
    monkeypatch.setattr(algo, "products_per_second", lambda threads, *_: -threads)
    monkeypatch.setattr(algo, "exact_precision", lambda device: "high")
    flags = f"--env-id {environment(algo, 'Bandit')} --total-timesteps 60 --learning-starts 50 --eval-episodes 1"
    run_dir = train(algo, f"{flags} --hidden-sizes 8 --torch-threads auto")["run_dir"]
    kept = json.loads((run_dir / "args.json").read_text())["args"]
    assert (kept["torch_threads"], kept["matmul_precision"]) == (1, "high")
    assert "auto: --torch-threads 1 --matmul-precision high\n" in capsys.readouterr().out
    monkeypatch.setattr(algo, "exact_precision", lambda device: "medium")
    train(algo, f"--resume {run_dir} --total-timesteps 70")
    assert json.loads((run_dir / "args.json").read_text())["args"]["matmul_precision"] == "high"
    assert "auto:" not in capsys.readouterr().out

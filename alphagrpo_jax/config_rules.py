"""The rules between the fields of a configuration, each refused with what would be right.

What a single field may be stands beside it, in `config`.
"""

from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.score_specs import short_name
from alphagrpo_jax.tasks import IMAGE, TASKS


def check(config: Config) -> None:
    """Checks all rules.

    Raises:
      ConfigError: fields that do not go together; the message names them.
    """
    _check_sizes(config)
    _check_tasks(config)
    _check_algorithms(config)
    _check_verifier(config)
    _check_reward(config)


def _check_sizes(config: Config) -> None:
    """Checks sizes and modes that must agree with each other."""
    rollout, train = config.rollout, config.train
    lo, hi = rollout.window_range
    if not 0 <= lo <= hi - rollout.window or hi > rollout.num_points - 1:
        raise ConfigError(
            f"rollout.window_range: got {lo, hi} for a window of {rollout.window} among "
            f"{rollout.num_points - 1} steps (rollout.num_points - 1); expected "
            "0 <= lo, lo + window <= hi <= number of steps"
        )
    if rollout.sampler == "cps" and (hi == rollout.num_points - 1 or rollout.noise_level >= 1):
        raise ConfigError(
            "rollout.sampler=cps: the last step has no noise, so window_range must end before it, "
            f"and noise_level must be below 1; got {lo, hi} and {rollout.noise_level}"
        )
    if train.updates_per_batch > 1 and train.old_logprob == "self":
        raise ConfigError(
            f"train.old_logprob=self is exact for one update per batch only; got "
            f"train.updates_per_batch={train.updates_per_batch}: use 'recompute'"
        )
    if config.loss.entropy_fraction < 1 and train.old_logprob == "self":
        raise ConfigError("loss.entropy_fraction below 1 needs train.old_logprob=recompute")
    if config.loss.text == config.loss.image == "none":
        raise ConfigError("loss.text and loss.image are both 'none': nothing would be trained")


def _check_algorithms(config: Config) -> None:
    """Checks that the image loss has the samples and the average that it needs."""
    loss, sampler = config.loss, config.rollout.sampler
    if loss.image != "none" and loss.matches != (sampler == "ode"):
        expected = "ode" if loss.matches else "sde or cps"
        raise ConfigError(
            f"rollout.sampler: got {sampler!r} for loss.image={loss.image}, expected {expected}: "
            "losses of velocities train on finished images, the others on stochastic steps"
        )
    if sampler == "ode" and config.rollout.shared_noise:
        alike = [name for name in config.tasks if TASKS[name].draws and not TASKS[name].text_kinds]
        if alike:
            raise ConfigError(
                f"rollout.shared_noise: got True with rollout.sampler=ode and task {alike[0]!r}, "
                "expected False: without texts and stochastic steps all images of a group would be "
                "the same, and no update would be taken"
            )
    if loss.matches and not config.optimizer.average_limit:
        raise ConfigError(
            f"optimizer.average_limit: got 0, but loss.image={loss.image} compares with the moving "
            "average of the trained weights; set it above 0, e.g. 0.3"
        )
    if loss.text == "remax" and (loss.text_beta or loss.entropy_fraction < 1):
        raise ConfigError(
            f"loss.text=remax: got loss.text_beta={loss.text_beta} and loss.entropy_fraction="
            f"{loss.entropy_fraction}, expected 0 and 1: it has no KL and trains all tokens"
        )
    if loss.image == "remax" and loss.image_beta:
        raise ConfigError(
            f"loss.image=remax: got loss.image_beta={loss.image_beta}, expected 0: it has no KL"
        )


def _check_tasks(config: Config) -> None:
    """Checks the names of tasks, alone or mixed, and the fields that they need."""
    names, mixed, srr = (*TASKS, "mixed"), config.mixed, config.srr
    if config.task not in names:
        raise ConfigError(f"task: got {config.task!r}, expected one of {names}")
    if config.task == "mixed":
        unknown = sorted(set(mixed.tasks) - set(TASKS))
        if unknown or not mixed.tasks or len(set(mixed.tasks)) < len(mixed.tasks):
            raise ConfigError(
                f"mixed.tasks: got {mixed.tasks}, expected different ones of {tuple(TASKS)}"
            )
        if len(mixed.weights) != len(mixed.tasks):
            raise ConfigError(
                f"mixed.weights: got {mixed.weights}, expected {len(mixed.tasks)} numbers, one for "
                "each of mixed.tasks"
            )
    for task in (TASKS[name] for name in config.tasks):
        if "" in config.data.pair(task.data):
            key = task.data.removesuffix("s")
            raise ConfigError(
                f"task {task.name} needs data.{key}_train and data.{key}_heldout, files of records"
            )
        for kind, steps in (("text", task.text_kinds), ("image", task.events.count(IMAGE))):
            trained_kind = {"text": "image", "image": "text"}[kind]
            if not steps and vars(config.loss)[trained_kind] == "none":
                raise ConfigError(
                    f"task {task.name} has no {kind} to train; loss.{trained_kind} must not be "
                    "'none'"
                )
    refining = [name for name in config.tasks if TASKS[name].refines]
    if config.verifier.kind == "self" and refining and srr.reflection_format == "verifier":
        raise ConfigError(
            "srr.reflection_format=verifier asks long questions, for which verifier.kind=self has "
            "no room; use another verifier, or 'rule' or 'none'"
        )
    if len(refining) > 1:
        raise ConfigError(f"mixed.tasks: got {refining}, but only one task may refine images")
    if not refining:
        if config.advantage.baseline != "group":
            raise ConfigError(
                f"advantage.baseline={config.advantage.baseline!r} compares with an initial "
                "image, which only refining tasks have; use 'group'"
            )
        return
    if srr.queue_prompts < config.train.prompts_per_step:
        raise ConfigError(
            f"srr.queue_prompts: got {srr.queue_prompts}, expected at least "
            f"train.prompts_per_step={config.train.prompts_per_step}"
        )


def _check_reward(config: Config) -> None:
    """Checks the fields that the reward's scores need."""
    reward = config.reward
    names, weights = tuple(map(short_name, reward.scores)), reward.extra_weights
    if len(set(names)) < len(names):
        raise ConfigError(
            f"reward.extra_scores: got {reward.extra_scores} beside reward.score={reward.score!r}, "
            f"which are called {names} in metrics; expected different names: leave out the double "
            "one, or name a scorer by ?name=NAME"
        )
    if len(weights) != len(reward.extra_scores):
        raise ConfigError(
            f"reward.extra_weights: got {weights}, expected {len(reward.extra_scores)} numbers, "
            "one for each of reward.extra_scores (the weight of reward.score is 1)"
        )
    _check_scorers(config)
    if "holistic" not in reward.scores:
        return
    if not all((*reward.rate_semantic, *reward.rate_quality, reward.rate_semantic,
                reward.rate_quality)):  # fmt: skip
        raise ConfigError(
            "reward.rate_semantic and reward.rate_quality: got an empty list or text, expected at "
            "least one question each for the holistic score"
        )
    if "ti2i" in config.tasks:
        raise ConfigError(
            "reward.score=holistic asks how well an image matches its prompt, but the prompts of "
            "task ti2i are instructions; use confidence or binary there"
        )


def _check_scorers(config: Config) -> None:
    """Checks that the verifiers can answer what the scores need."""
    verifier = config.verifier
    if verifier.second and not config.reward.judged:
        raise ConfigError(
            f"verifier.second: got {verifier.second!r}, but reward.score and reward.extra_scores "
            f"{config.reward.scores} ask no verifier; leave it empty"
        )
    needs_likelihood = any(spec.kind == "likelihood" for spec in config.reward.scorers)
    if needs_likelihood and (verifier.kind == "openai" or verifier.endpoints):
        raise ConfigError(
            "the score likelihood is the probability of a prompt's tokens, which chat servers do "
            "not give; use verifier.kind=hf without endpoints, or verifier.kind=self"
        )


def _check_verifier(config: Config) -> None:
    """Checks the fields that endpoints need, and that endpoints are there where needed."""
    verifier = config.verifier
    if verifier.kind == "self":
        has_log = any(spec.has_processes for spec in config.reward.scorers)
        if verifier.endpoints or (verifier.audit and not has_log):
            raise ConfigError(
                "verifier.kind=self: the policy answers alone and keeps no log of attempts; leave "
                "verifier.endpoints and, without scorers that have processes, verifier.audit empty"
            )
        if "holistic" in config.reward.scores:
            raise ConfigError(
                "verifier.kind=self: the policy gives no ratings, so reward.score and "
                "reward.extra_scores must not be holistic"
            )
    if verifier.kind == "openai" and not verifier.endpoints:
        raise ConfigError(
            "verifier.kind=openai needs verifier.endpoints, a list of base URLs such as "
            "('http://127.0.0.1:8000/v1',); launch/verifiers.sh starts a server"
        )
    if not verifier.endpoints and not verifier.second.startswith("openai:"):
        return
    if not verifier.model:
        raise ConfigError(
            "endpoints (verifier.endpoints, verifier.second) need verifier.model, the name that "
            "they serve"
        )
    if verifier.question_seconds > verifier.attempt_seconds:
        raise ConfigError(
            f"verifier.question_seconds={verifier.question_seconds} is more than "
            f"verifier.attempt_seconds={verifier.attempt_seconds}, which all requests "
            "about a question have together"
        )

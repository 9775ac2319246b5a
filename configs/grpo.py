"""The embedded default: reasoning text-to-image GRPO in the shapes world.

    python -m alphagrpo_jax.train --config=configs/grpo.py

Hardware: two CPU cores; time, memory and results stand in docs/results.md with their commands.

Where it departs from the paper's numbers (those are in `configs/bagel_7b_rt2i.py`), and why: a
small model is sampled without guidance and from the whole vocabulary; a group shares its initial
noise, so that its rewards differ by the think texts and less by luck in sampling images; rewards
are scaled by the spread within groups, since easy and hard prompts are mixed; the image side learns
at a tenth of the rate (`optimizer.gen_scale`), above which images got worse; and the rate falls to
zero over the run. `alphagrpo_jax/config.py` says what each option means.
"""

from ml_collections import ConfigDict


def guidance(interval: tuple[float, float], renorm: str) -> ConfigDict:
    """Returns classifier-free guidance, off: the small model is sampled without it."""
    config = ConfigDict()
    config.text_scale = 1.0
    config.image_scale = 1.0
    config.interval = interval
    config.renorm = renorm
    config.renorm_min = 0.0
    return config


def verifier() -> ConfigDict:
    """Returns the shipped verifier in two processes of this machine, without endpoints."""
    config = ConfigDict()
    config.kind = "hf"
    config.path = "package:verifier"
    config.endpoints = ()
    config.model = ""
    config.api_key_env = ""
    config.extra_body = ""
    config.concurrency = 64
    config.question_seconds = 30.0
    config.top_logprobs = 5
    config.workers = 2
    config.threads = 1
    config.device = "cpu"
    config.dtype = "float32"
    config.top_k = 0
    config.instruction = (
        "You are a strict image auditor. Answer only yes or no. "
        "If a subject of the question is absent, answer no."
    )
    config.min_mass = 0.2
    config.read = "first"
    config.max_tokens = 2048
    config.text_fallback = False
    config.attempt_seconds = 60.0
    config.total_seconds = 600.0
    config.start_seconds = 300.0
    config.max_attempts = 4
    config.cache_size = 0
    config.second = ""
    config.audit = ""
    return config


def reward() -> ConfigDict:
    """Returns DVReward by confidences, and the format reward of the think text."""
    config = ConfigDict()
    config.aggregate = "geometric"
    config.score = "confidence"
    config.extra_scores = ()
    config.extra_weights = ()
    config.rate_semantic = ("How well does the image match the prompt: {prompt}?",)
    config.rate_quality = ("How well is the image drawn?",)
    config.dependencies = False
    config.format_weight = 1.0
    config.isolate = False
    config.max_invalid_fraction = 0.2
    return config


def get_config() -> ConfigDict:
    """Returns every option with its default value."""
    config = ConfigDict()
    config.seed = 0
    config.task = "rt2i"

    config.model = ConfigDict()
    config.model.path = "package:umm"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.unroll = 1
    config.model.attention = "plain"
    config.model.height = 48
    config.model.width = 48

    config.lora = ConfigDict()
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.lora.targets = r"language_model/layers/(self_attn|mlp|mlp_moe_gen)/\w+_proj(_moe_gen)?"
    config.lora.init_from = ""

    config.verifier = verifier()
    config.reward = reward()

    config.data = ConfigDict()
    config.data.train = "package:data/train.jsonl"
    config.data.heldout = "package:data/heldout.jsonl"
    config.data.edit_train = config.data.edit_heldout = ""
    config.data.answer_train = config.data.answer_heldout = ""

    config.rollout = ConfigDict()
    config.rollout.prompt_tokens = 32
    config.rollout.text_tokens = 40
    config.rollout.num_points = 12
    config.rollout.shift = 3.0
    config.rollout.window = 2
    config.rollout.window_range = (0, 5)
    config.rollout.noise_level = 0.7
    config.rollout.sampler = "sde"
    config.rollout.shared_noise = True
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0
    config.rollout.micro_batch = 24
    config.rollout.length_buckets = 1
    config.rollout.merge_lora = True
    config.rollout.guidance = guidance((0.4, 1.0), "global")
    config.rollout.edit_guidance = guidance((0.0, 1.0), "text_channel")

    config.srr = ConfigDict()
    config.srr.source = "drawn"
    config.srr.initial_images = 4
    config.srr.queue_prompts = 24
    config.srr.num_points = 12
    config.srr.text_tokens = 72
    config.srr.choice = "worst"
    config.srr.rectification = "released"
    config.srr.reflection_format = "none"

    config.mixed = ConfigDict()
    config.mixed.tasks = ("rt2i", "srr")
    config.mixed.weights = (1.0, 1.0)
    config.mixed.batches = 1

    config.train = ConfigDict()
    config.train.steps = 200
    config.train.prompts_per_step = 8
    config.train.group_size = 12
    config.train.micro_batch = 48
    config.train.updates_per_batch = 1
    config.train.trainable = "lora"
    config.train.full_targets = (
        r"language_model/layers/.*|language_model/norm.*|(vae2llm|llm2vae|time_embedder)/.*"
    )
    config.train.old_logprob = "recompute"
    config.train.keep_residuals = True
    config.train.text_chunk = 14
    config.train.image_steps_at_once = True
    config.train.merge_lora = True
    config.train.context_gradient = False

    config.loss = ConfigDict()
    config.loss.text = "grpo"
    config.loss.image = "grpo"
    config.loss.text_loss_weight = 1.0
    config.loss.level = "sequence"
    config.loss.clip_low = 0.20
    config.loss.clip_high = 0.28
    config.loss.entropy_fraction = 1.0
    config.loss.entropy_mean = "all"
    config.loss.text_beta = 0.0
    config.loss.image_clip = 1e-5
    config.loss.advantage_clip = 5.0
    config.loss.image_beta = 0.0
    config.loss.nft_beta = 1.0
    config.loss.awm_clip = 1.0
    config.loss.awm_average_beta = 1.0
    config.loss.report_kl = False

    config.advantage = ConfigDict()
    config.advantage.std = "global_centered"
    config.advantage.baseline = "group"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 6e-4
    config.optimizer.gen_scale = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0
    config.optimizer.warmup_steps = 5  # linear from 0: the first update has rate 0
    config.optimizer.decay_steps = 200  # 0 from there on; set it with train.steps
    config.optimizer.average_limit = 0.0
    config.optimizer.average_rate = 0.001

    config.eval = ConfigDict()
    config.eval.every = 50
    config.eval.prompts = 400
    config.eval.micro_batch = 48
    config.eval.temperature = 1.0
    config.eval.top_p = 1.0
    config.eval.num_points = 12
    config.eval.text_guidance = 1.0
    config.eval.seed = 1
    config.eval.checker = "shapes"

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 25
    config.checkpoint.keep = 2
    config.checkpoint.stop_seconds = 6.0

    config.log = ConfigDict()
    config.log.samples = 25
    config.log.tensorboard = True
    config.log.wandb = ""
    config.log.progress = True

    config.cache = ConfigDict()
    config.cache.dir = ""

    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config

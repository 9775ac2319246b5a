"""BAGEL-7B-MoT, reasoning text-to-image, with the numbers of AlphaGRPO (arXiv 2605.12495).

    python -m alphagrpo_jax.train --config=configs/bagel_7b_rt2i.py \\
      --config.model.path=BAGEL-7B-MoT --config.verifier.endpoints='("http://HOST:8000/v1",)' \\
      --config.data.train=train.jsonl --config.data.heldout=heldout.jsonl

Hardware: the authors used 8 nodes of 8 A100, one GPU per node for the verifier. Here the base's
29 GB of weights are whole on every device (`mesh.fsdp=1`), so that writing text moves nothing
between them; chips of 32 GB need `mesh.tensor=4`. Micro-batches of 1 are one row per device,
whatever the number of devices. Ask before paying, with the machine's own compiler:

    python -m alphagrpo_jax.plan --config=configs/bagel_7b_rt2i.py --topology=v5p:4x4x4

docs/performance.md has what it said; never run here as a whole. Texts are half as
long as the authors' (`rollout.text_tokens=1024`).
Expected (the authors'): TIIF-Bench overall 75.2 / 78.6 -> 78.9 / 79.5 (short / long).
"""

from ml_collections import ConfigDict

from configs import grpo


def get_config() -> ConfigDict:
    """Returns the default configuration with BAGEL-7B's model, sizes and rates."""
    config = grpo.get_config()
    config.model.path = "BAGEL-7B-MoT"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.attention = "fused"
    config.train.keep_residuals = False  # 7 GB per trajectory
    config.train.text_chunk = 0
    config.train.image_steps_at_once = False
    config.train.merge_lora = False  # bfloat16 would round the adapters
    config.model.height = 512
    config.model.width = 512
    config.verifier.kind = "openai"  # on machines or cards of its own, by launch/verifiers.sh
    config.verifier.endpoints = ("http://127.0.0.1:8000/v1",)
    config.verifier.model = "Qwen/Qwen3-VL-30B-A3B-Instruct"
    config.data.train = "train.jsonl"
    config.data.heldout = "heldout.jsonl"
    config.rollout.prompt_tokens = 512
    config.rollout.text_tokens = 512
    config.rollout.length_buckets = 4
    config.rollout.num_points = 16
    config.rollout.window = 10
    config.rollout.window_range = (0, 11)
    config.rollout.top_p = 0.8
    config.rollout.shared_noise = False
    config.rollout.micro_batch = 1
    config.rollout.merge_lora = False
    config.rollout.guidance.text_scale = 4.0
    config.rollout.edit_guidance.text_scale = 4.0
    config.rollout.edit_guidance.image_scale = 2.0
    config.train.steps = 500
    config.train.prompts_per_step = 32
    config.train.group_size = 14
    config.train.micro_batch = 1
    config.train.old_logprob = "self"
    config.advantage.std = "global_raw"
    config.optimizer.learning_rate = 5e-5
    config.optimizer.gen_scale = 1.0
    config.optimizer.decay_steps = 0
    config.optimizer.warmup_steps = 0
    config.eval.every = 50
    config.eval.prompts = 448
    config.eval.micro_batch = 112
    config.eval.temperature = 0.3
    config.eval.num_points = 40
    config.eval.text_guidance = 4.0
    config.eval.checker = ""
    config.checkpoint.every = 10
    config.mesh.data = -1
    return config

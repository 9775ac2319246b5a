"""A pool that asks a verifier and several scorers about the same samples and joins their results.

Each has a pool of its own, so that none holds up the others. A sample is valid only if all of them
answered.
"""

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from alphagrpo_jax.rewards.workers.in_process import InProcessPool
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.rewards.workers.pool import Pool, PoolError

VERIFIER = "verifier"


class CombinedPool:
    """A `scoring.VerifierPool` over the pools of a verifier and of scorers; a context manager.

    Attributes:
      verifier: the verifier's pool.
      scorers: by name, the scorers' pools. The verifier's own stands for likelihoods.
    """

    def __init__(
        self, verifier: Pool | InProcessPool, scorers: Mapping[str, Pool | InProcessPool]
    ) -> None:
        """Joins pools, which it closes in the end.

        Args:
          verifier: answers the questions.
          scorers: by name, in the order of the prompts that `submit` gets.
        """
        self.verifier, self.scorers = verifier, dict(scorers)
        # By sample: the names of the pools that have it.
        self._submitted: dict[Hashable, list[str]] = {}

    def __enter__(self) -> "CombinedPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pools(self) -> dict[str, Pool]:
        """The pools with worker processes, by name: `VERIFIER`, if it has any, and scorers."""
        pools = {VERIFIER: self.verifier, **self._own_pools}
        return {name: pool for name, pool in pools.items() if isinstance(pool, Pool)}

    @property
    def _own_pools(self) -> dict[str, Pool | InProcessPool]:
        """The pools of scorers that are not the verifier, by name."""
        return {name: pool for name, pool in self.scorers.items() if pool is not self.verifier}

    def wait_ready(self) -> None:
        """Waits until every worker has started or was given up.

        Raises:
          PoolError: all workers of one pool were given up; the message names the scorer.
        """
        for name, pool in self.worker_pools.items():
            try:
                pool.wait_ready()
            except PoolError as error:
                if name == VERIFIER:
                    raise
                raise PoolError(f"scorer {name}: {error}") from error

    def submit(
        self,
        sample_id: Hashable,
        image: np.ndarray,
        questions: Sequence[str],
        rated: Sequence[str] = (),
        scored: Sequence[str] = (),
    ) -> None:
        """Queues a sample everywhere; see `pool.Pool.submit`.

        Args:
          sample_id, image, questions, rated: see there.
          scored: a prompt for each scorer, in the order of `scorers`; none if no score is needed.
        Raises:
          ValueError: see there; or another number of prompts than of scorers.
          PoolError: see there.
        """
        if isinstance(scored, str) or len(scored) not in (0, len(self.scorers)):
            raise ValueError(
                f"sample {sample_id!r}: got prompts {scored!r}, expected none or one for each of "
                f"{[*self.scorers]}"
            )
        prompts = dict(zip(self.scorers, scored, strict=False))
        own_prompts = {name: prompts.pop(name) for name in self._own_pools if name in prompts}
        names = []
        if questions or rated or prompts:
            self.verifier.submit(sample_id, image, questions, rated, [*prompts.values()])
            names.append(VERIFIER)
        for name, prompt in own_prompts.items():
            self.scorers[name].submit(sample_id, image, (), (), [prompt])
            names.append(name)
        if not names:
            raise ValueError(f"sample {sample_id!r}: got no text, expected at least 1")
        self._submitted[sample_id] = names

    def gather(self, sample_ids: Iterable[Hashable]) -> dict[Hashable, VerifierResult]:
        """Waits for these samples and returns their joint results, in the order of the ids.

        Raises:
          ValueError, PoolError: see `pool.Pool.gather`.
        """
        sample_ids = list(dict.fromkeys(sample_ids))
        unknown = [sample_id for sample_id in sample_ids if sample_id not in self._submitted]
        if unknown:
            raise ValueError(
                f"got sample ids {unknown[:5]}, expected ids submitted and not yet gathered"
            )
        results: dict[str, dict[Hashable, VerifierResult]] = {}
        for name, pool in {VERIFIER: self.verifier, **self._own_pools}.items():
            held = [sample_id for sample_id in sample_ids if name in self._submitted[sample_id]]
            results[name] = pool.gather(held) if held else {}
        joined = {}
        for sample_id in sample_ids:
            names = self._submitted.pop(sample_id)
            joined[sample_id] = self._join({name: results[name][sample_id] for name in names})
        return joined

    def counters(self) -> dict[str, float]:
        """Returns the verifier's counters, and those of scorers as NAME/COUNTER."""
        return {
            counter if name == VERIFIER else f"{name}/{counter}": value
            for name, pool in self.worker_pools.items()
            for counter, value in pool.counters().items()
        }

    def close(self) -> None:
        """Ends all workers at once. May be called twice."""
        for pool in self.worker_pools.values():
            pool.close()

    def _join(self, results: Mapping[str, VerifierResult]) -> VerifierResult:
        """Joins a sample's results by pool; the first failure makes it invalid."""
        attempts = sum(result.attempts for result in results.values())
        latency = max(result.latency_s for result in results.values())
        failures = [
            result.failure if name == VERIFIER else f"{name}: {result.failure}"
            for name, result in results.items()
            if not result.valid
        ]
        judged = results.get(VERIFIER)
        # Of the verifier's own scores one belongs to each scorer that it stands for, in order.
        likelihoods = iter(judged.scores if judged else ())
        scores: list[float] = []
        for name, pool in self.scorers.items():
            if pool is self.verifier:
                scores += itertools.islice(likelihoods, 1)
            elif name in results:
                scores += results[name].scores
        return VerifierResult(
            p_yes=None if failures else judged.p_yes if judged else (),
            valid=not failures,
            failure=failures[0] if failures else None,
            attempts=attempts,
            worker=judged.worker if judged and not failures else None,
            latency_s=latency,
            ratings=judged.ratings if judged and not failures else (),
            scores=() if failures else tuple(scores),
            masses=judged.masses if judged and not failures else (),
            unanswerable=next(
                (text for result in results.values() if (text := result.unanswerable) is not None),
                None,
            ),
        )

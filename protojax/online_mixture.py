"""`OnlineGaussianMixture`: the prototype engine's online EM as a scikit-learn estimator. See docs/online_mixture.md.

scikit-learn is needed here and nowhere else in the package. The array programs are in `online_mixture_blocks`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax import online_mixture_blocks as programs
from protojax import online_mixture_checks as checks
from protojax.api import PyTree
from protojax.estimators import mixture_step as em
from protojax.ops.gaussian import Covariance
from protojax.schedules import check_choice

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "protojax.OnlineGaussianMixture needs scikit-learn 1.6 or newer: pip install 'protojax[sklearn]'."
    ) from error

COVARIANCES: dict[str, Covariance] = {"diag": "diag", "spherical": "spherical", "tied_diag": "tied"}
FLOATS = (np.float64, np.float32)
SEED_ROWS = 16_384  # rows that seeding looks at, at most, or 2 K if that is more


class _Run(NamedTuple):
    """One trial of `fit`. state: engine state; lower_bound: its mean log-likelihood; n_steps: M-steps taken."""

    state: PyTree
    lower_bound: float
    n_iter: int
    n_steps: int
    converged: bool


class OnlineGaussianMixture(DensityMixin, BaseEstimator):
    """Gaussian mixture with diagonal covariances, fitted by streamed EM: full-batch, mini-batch, or on a stream.

    p(x) = sum_k pi_k N(x | mu_k, S_k). No array of n_samples x n_components is ever held (`predict_proba` returns
    one), so that memory does not grow with the number of rows and tens of thousands of components fit. Computation is
    in the dtype of X, float64 or float32, whatever JAX's own setting; other dtypes become float64. After `fit` with
    `batch_size=None` the parameters are those of `sklearn.mixture.GaussianMixture` from the same start.

    Parameters
    ----------
    n_components : int, K.
    covariance_type : 'diag' (a variance a component and feature), 'spherical' (one a component) or 'tied_diag' (one a
        feature, shared by all components).
    tol : `fit` ends when the mean log-likelihood of an iteration changes by less, in nats a row.
    reg_covar : added to every variance, in squared units of X.
    max_iter : iterations over all rows; in `partial_fit` the number of calls that schedules extend over.
    batch_size : None: each iteration is one EM step on all rows. An int: each iteration visits all rows in a new
        pseudo-random order, with one M-step every `batch_size` rows.
    eta : learning rate of mini-batches and of `partial_fit`, in (0, 1], or a schedule such as
        ('exponential', 0.2, 0.01) (`protojax.schedules`). With eta = 1 nothing is carried over from earlier batches.
    forgetting : how a component forgets. 'responsibility': by its own evidence,
        a_k = 1 - (1 - eta)^(n_k K / N) with n_k its share of the batch's N rows (Celaya & Agostini 2015, batched), so
        that rare components keep what they know; their weights never fall below 0.01 / K. 'uniform': by time, every
        statistic times (1 - eta) a step (Cappé & Moulines 2009). 'none': all rows so far count alike,
        eta = N / rows so far (eta is ignored); within `fit` the past is at most one iteration long, so that one
        batch of all rows is exactly an EM step.
    annealing : inverse temperature beta in (0, 1], a number or a schedule over the iterations: responsibilities are
        proportional to (pi_k N_k)^beta while fitting (Ueda & Nakano 1998). `fit` does not stop before the schedule
        has reached its end. Predictions always use beta = 1.
    revival : components a step, at most, that are moved onto badly explained rows when their usage is below 1 / (10 K).
        0: never. It also moves components that are rightly as rare as that.
    init_params : 'k-means++', 'kmeans' (scikit-learn's, run to its end) or 'random' (rows at random), on a random
        sample of max(16384, 2 K) rows at most. Weights start equal, variances as the scatter around the nearest mean.
    n_init : trials of `fit`; the one of largest likelihood is kept.
    weights_init [K], means_init [K,D], precisions_init (shape of `precisions_`) : start from these instead.
    random_state : int, RandomState or None.
    warm_start : `fit` continues from the last state instead of starting afresh (one trial).
    verbose : 1 prints the likelihood of every iteration.
    tile : components that a block of logits holds at most; changes memory and speed, not results.

    Attributes
    ----------
    weights_ [K], means_ [K,D], covariances_ and precisions_ ([K,D], [K] or [D] by covariance_type).
    converged_ : whether `tol` was reached (False after `partial_fit`). n_iter_ : iterations, or calls of `partial_fit`.
    lower_bound_ : mean log-likelihood of the last iteration's rows before its last M-steps, in nats a row.
    n_steps_, n_rows_seen_ : M-steps, and rows they have learned from (rows of X once after `fit`).
    n_features_in_, feature_names_in_ : as everywhere in scikit-learn.
    """

    def __init__(
        self, n_components=1, *, covariance_type="diag", tol=1e-3, reg_covar=1e-6, max_iter=100, batch_size=None,
        eta=0.05, forgetting="responsibility", annealing=1.0, revival=0, init_params="k-means++", n_init=1,
        weights_init=None, means_init=None, precisions_init=None, random_state=None, warm_start=False, verbose=0,
        tile=2048,
    ):  # fmt: skip
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.eta = eta
        self.forgetting = forgetting
        self.annealing = annealing
        self.revival = revival
        self.init_params = init_params
        self.n_init = n_init
        self.weights_init = weights_init
        self.means_init = means_init
        self.precisions_init = precisions_init
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.tile = tile

    # ------------------------------------------------------------------------------------------------ fitting
    def fit(self, X, y=None):
        """Fit to the rows of X [n_samples, n_features] by EM, full-batch or in mini-batches; y is ignored.

        Warns with ConvergenceWarning when `tol` was not reached. Raises ValueError for rows that are not finite,
        fewer rows than components, and options out of range."""
        plan = self._plan(full_batch=self.batch_size is None)
        n_init, max_iter = checks.integer("n_init", self.n_init, 1), checks.integer("max_iter", self.max_iter, 1)
        X = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2)
        if len(X) < plan.options.components:
            raise ValueError(
                f"Expected n_samples >= n_components, got n_samples = {len(X)}, n_components = {self.n_components}: "
                "give more rows or ask for fewer components."
            )
        random = self._random_state = check_random_state(self.random_state)
        continues = self.warm_start and hasattr(self, "_state")
        best: _Run | None = None
        with jax.enable_x64(bool(X.dtype == np.float64)):
            for _ in range(1 if continues else n_init):
                state = self._continued(X.shape[1], X.dtype, plan) if continues else self._initial(X, plan, random)
                run = (self._full_batch if self.batch_size is None else self._mini_batch)(
                    X, state, plan, max_iter, random
                )
                best = run if best is None or run.lower_bound > best.lower_bound else best
            assert best is not None
            self._publish(best, plan)
        self.n_rows_seen_ = len(X)
        if not self.converged_:
            warnings.warn(
                f"EM did not converge within {max_iter} iterations. Increase max_iter or tol, or try another start.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def fit_predict(self, X, y=None):
        """`fit`, then the component [n_samples] of each row of X."""
        return self.fit(X).predict(X)

    def partial_fit(self, X, y=None):
        """One online EM step on the rows of X [n_samples, n_features], a batch of a stream; y is ignored.

        The first call also starts the components, from its own rows unless means_init is given: it then needs at
        least n_components of them. Later batches may have any size. Raises ValueError as `fit` does."""
        first = not hasattr(self, "_state")
        plan = self._plan(full_batch=False)
        X = validate_data(self, X, dtype=FLOATS, reset=first)
        if first and self.means_init is None and len(X) < plan.options.components:
            raise ValueError(
                f"The first call of partial_fit starts the components from its rows and needs n_samples >= "
                f"n_components, got n_samples = {len(X)}, n_components = {self.n_components}: give a larger first "
                "batch, or means_init."
            )
        dtype = X.dtype if first else self.means_.dtype
        if first or not hasattr(self, "_random_state"):
            self._random_state = check_random_state(self.random_state)
        random = self._random_state
        with jax.enable_x64(bool(dtype == np.float64)):
            state = self._initial(X, plan, random) if first else self._continued(X.shape[1], dtype, plan)
            steps, seen = (0, 0) if first else (self.n_steps_, self.n_rows_seen_)
            fraction = steps / checks.integer("max_iter", self.max_iter, 1)
            blocks = programs.Blocks(X, dtype)
            state, bound, _ = self._step(state, blocks, plan, fraction, len(X) / (seen + len(X)), random)
            iterations = steps if first else self.n_iter_
            self._publish(_Run(state, bound, iterations + 1, steps + 1, False), plan)
        self.n_rows_seen_ = seen + len(X)
        return self

    def _full_batch(self, X: np.ndarray, state: PyTree, plan: programs.Plan, max_iter: int, random: Any) -> _Run:
        """EM on all rows until the lower bound stands still."""
        blocks = programs.Blocks(X, X.dtype)
        bound, last = -math.inf, checks.share_at("annealing", self.annealing, 1.0)
        for iteration in range(max_iter):
            before, fraction = bound, iteration / max(max_iter - 1, 1)
            state, bound, revived = self._step(state, blocks, plan, fraction, 1.0, random, eta=1.0)
            self._tell(iteration, bound)
            settled = revived == 0 and checks.share_at("annealing", self.annealing, fraction) == last
            if settled and abs(bound - before) < self.tol:
                return _Run(state, bound, iteration + 1, iteration + 1, True)
        return _Run(state, bound, max_iter, max_iter, False)

    def _mini_batch(self, X: np.ndarray, state: PyTree, plan: programs.Plan, max_iter: int, random: Any) -> _Run:
        """Passes over all rows in pseudo-random order, an M-step a batch, until the mean bound stands still."""
        batch = min(checks.integer("batch_size", self.batch_size, 1), len(X))
        starts = range(0, len(X), batch)
        mean, last, seen, steps = -math.inf, checks.share_at("annealing", self.annealing, 1.0), 0, 0
        for iteration in range(max_iter):
            before, total, revived, fraction = mean, 0.0, 0, 0.0
            order = checks.Order(len(X), random)
            for start in starts:
                fraction = steps / max(max_iter * len(starts) - 1, 1)
                rows = X[order.batch(start, batch)]
                seen += len(rows)
                window = len(rows) / min(seen, len(X))
                blocks = programs.Blocks(rows, X.dtype)
                state, bound, moved = self._step(state, blocks, plan, fraction, window, random)
                total, revived, steps = total + bound * len(rows), revived + moved, steps + 1
            mean = total / len(X)
            self._tell(iteration, mean)
            settled = revived == 0 and checks.share_at("annealing", self.annealing, fraction) == last
            if settled and abs(mean - before) < self.tol:
                return _Run(state, mean, iteration + 1, steps, True)
        return _Run(state, mean, max_iter, steps, False)

    def _step(
        self, state: PyTree, blocks: programs.Blocks, plan: programs.Plan, fraction: float, window: float, random: Any,
        eta: float | None = None,
    ) -> tuple[PyTree, float, int]:  # fmt: skip
        """(state, bound, components revived) after one E-step on the blocks and one M-step.

        fraction: of the run, for schedules. window: rate with which all rows so far count alike."""
        if eta is None:
            eta = window if self.forgetting == "none" else checks.share_at("eta", self.eta, fraction)
        dtype = blocks.dtype
        beta = jnp.asarray(checks.share_at("annealing", self.annealing, fraction), dtype)
        state = {**state, "shared": {**state["shared"], "beta": beta}}
        stats = programs.statistics(state, blocks, plan)
        new, bound = programs.m_step(state, stats, jnp.asarray(eta, dtype), plan)
        if not math.isfinite(bound):
            raise ValueError(
                f"the mean log-likelihood became {float(bound)}: squares of the rows leave the range of {dtype}. Scale "
                "the features (for example with sklearn.preprocessing.StandardScaler), raise reg_covar or pass float64."
            )
        revived = 0
        if plan.options.revive:
            key = jax.random.key(int(random.randint(2**31 - 1)))
            features, mask = blocks.block(blocks.size * int(random.randint(-(-len(blocks.rows) // blocks.size))))
            new, number = programs.revive(new, features, mask, key, plan)
            revived = int(number)
        return new, float(bound), revived

    # --------------------------------------------------------------------------------------------------- start
    def _plan(self, full_batch: bool) -> programs.Plan:
        """Checked options, in the form that programs are compiled for."""
        check_choice("init_params", self.init_params, ("k-means++", "kmeans", "random"))
        forgetting = check_choice("forgetting", self.forgetting, ("responsibility", "uniform", "none"))
        for name in ("tol", "reg_covar"):
            checks.not_negative(name, getattr(self, name))
        by_evidence = forgetting == "responsibility" and not full_batch
        options = em.Options(
            components=checks.integer("n_components", self.n_components, 1),
            covariance=COVARIANCES[check_choice("covariance_type", self.covariance_type, COVARIANCES)],
            uniform=not by_evidence,
            learned=True,
            weight_rate=None,
            weight_floor=1e-2 if by_evidence else 0.0,
            variance_floor=0.0,  # reg_covar does this, in scikit-learn's way
            center=False,
            center_rate=0.01,
            price=0.0,
            usage_rate=1.0 if full_batch else 0.01,  # a batch sees few rows of a component, all rows see all
            revive=checks.integer("revival", self.revival, 0),
            revive_below=0.1,
        )
        return programs.Plan(options, float(self.reg_covar), checks.integer("tile", self.tile, 1))

    # A weight of 0 excludes its component; values whose squares overflow are reported by the first step.
    @np.errstate(divide="ignore", over="ignore", invalid="ignore")
    def _initial(self, X: np.ndarray, plan: programs.Plan, random: Any) -> PyTree:
        """Engine state started from (a sample of) the rows of X, and from what the user gave."""
        count, limit = plan.options.components, max(SEED_ROWS, 2 * plan.options.components)
        sample = X if len(X) <= limit else X[np.unique(random.randint(len(X), size=limit))]
        center = sample.mean(axis=0, dtype=np.float64).astype(X.dtype)
        sample = sample - center
        weights = checks.given_weights(self.weights_init, count, X.dtype)
        means = checks.given_array("means_init", self.means_init, (count, X.shape[1]), X.dtype)
        shape = checks.covariance_shape(plan.options.covariance, count, X.shape[1])
        precisions = checks.given_precisions(self.precisions_init, shape, X.dtype)
        if means is not None:
            means = means - center
        elif self.init_params == "kmeans":
            from sklearn.cluster import KMeans

            means = KMeans(count, n_init=1, random_state=random).fit(sample).cluster_centers_.astype(X.dtype)
        shared = precisions is None
        if means is None:
            key = jax.random.key(int(random.randint(2**31 - 1)))
            method = "kmeans++" if self.init_params == "k-means++" else "sample"
            means, scatter = programs.seeds(sample, key, count, method)
        elif shared:
            equal = programs.Parameters(jnp.asarray(means), jnp.ones((count,), X.dtype), jnp.zeros((count,), X.dtype))
            nearest = plan._replace(options=plan.options._replace(covariance="spherical"))
            labels = np.zeros(len(sample), np.int32)
            programs.by_blocks(programs.labels, sample, labels, equal, nearest, min(count, plan.tile))
            scatter = np.mean((sample - np.asarray(means)[labels]) ** 2, axis=0)
        log_weights = jnp.asarray(np.log(weights))
        variances = scatter if precisions is None else 1.0 / precisions - np.asarray(plan.reg_covar, X.dtype)
        parts = programs.Parameters(jnp.asarray(means), jnp.asarray(variances), log_weights)
        return programs.initial_state(parts, jnp.asarray(center), shared, plan)

    def _continued(self, width: int, dtype: Any, plan: programs.Plan) -> PyTree:
        """The state of earlier calls, if it still fits the parameters and the width of X."""
        shape = checks.covariance_shape(plan.options.covariance, plan.options.components, width)
        if self.means_.shape != (plan.options.components, width) or self.covariances_.shape != shape:
            raise ValueError(
                f"cannot continue from means of shape {self.means_.shape} and covariances of shape "
                f"{self.covariances_.shape} with n_components = {self.n_components}, {width} features and "
                f"covariance_type = {self.covariance_type!r}: set them back, or start afresh with fit and "
                "warm_start=False."
            )
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self._state)

    def _publish(self, run: _Run, plan: programs.Plan) -> None:
        means, variances, log_weights = programs.published(run.state, plan)
        self.means_, self.covariances_ = np.array(means), np.array(variances)
        self.weights_ = np.exp(np.array(log_weights))
        self.precisions_ = 1.0 / self.covariances_
        self.converged_, self.n_iter_, self.n_steps_ = run.converged, run.n_iter, run.n_steps
        self.lower_bound_ = run.lower_bound
        # NumPy, so that it pickles and so that float64 outlives this method's x64 context.
        self._state = jax.tree.map(np.array, run.state)

    def _tell(self, iteration: int, bound: float) -> None:
        if self.verbose:
            print(f"OnlineGaussianMixture: iteration {iteration + 1}, mean log-likelihood {bound:.6f}")

    # ------------------------------------------------------------------------------------------------- reading
    def _evaluate(self, X: Any, program: Any, columns: int | None = None, dtype: Any = None) -> np.ndarray:
        """program's result for each row of X, block by block."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=FLOATS, reset=False)
        plan = self._plan(full_batch=True)
        number = np.result_type(X.dtype, self.means_.dtype)
        shape = (len(X),) if columns is None else (len(X), columns)
        result = np.empty(shape, number if dtype is None else dtype)
        with jax.enable_x64(bool(number == np.float64)), np.errstate(divide="ignore"):
            arrays = (self.means_, self.covariances_, np.log(self.weights_))
            parts = programs.Parameters(*(jnp.asarray(np.asarray(a, number)) for a in arrays))
            width = min(plan.tile, len(self.weights_)) if columns is None else columns
            return programs.by_blocks(program, X, result, parts, plan, width)

    def predict(self, X):
        """Component [n_samples] of largest responsibility for each row; ties go to the lowest index."""
        return self._evaluate(X, programs.labels, dtype=np.int64)

    def predict_proba(self, X):
        """Responsibilities [n_samples, n_components]: the one method whose result grows with both."""
        check_is_fitted(self)
        return self._evaluate(X, programs.responsibilities, columns=len(self.weights_))

    def score_samples(self, X):
        """Log-likelihood ln p(x) [n_samples] of each row, in nats."""
        return self._evaluate(X, programs.log_likelihood)

    def score(self, X, y=None):
        """Mean log-likelihood of the rows, in nats a row."""
        return float(np.mean(self.score_samples(X), dtype=np.float64))

    def bic(self, X):
        """Bayesian information criterion on X, the lower the better: parameters * ln(n_samples) - 2 ln p(X)."""
        scores = self.score_samples(X)
        return float(self._free_parameters() * math.log(len(scores)) - 2.0 * np.sum(scores, dtype=np.float64))

    def aic(self, X):
        """Akaike information criterion on X, the lower the better: 2 * parameters - 2 ln p(X)."""
        return float(2.0 * self._free_parameters() - 2.0 * np.sum(self.score_samples(X), dtype=np.float64))

    def _free_parameters(self) -> int:
        return self.means_.size + self.covariances_.size + len(self.weights_) - 1

    def sample(self, n_samples=1):
        """(rows [n_samples, n_features], components [n_samples]) drawn from the mixture, ordered by component."""
        check_is_fitted(self)
        number = checks.integer("n_samples", n_samples, 1)
        random = check_random_state(self.random_state)
        weights = self.weights_.astype(np.float64)
        labels = np.repeat(np.arange(len(weights)), random.multinomial(number, weights / weights.sum()))
        scale = np.sqrt(self.covariances_)
        if self.covariance_type != "tied_diag":
            scale = scale[labels] if self.covariance_type == "diag" else scale[labels, None]
        noise = random.standard_normal((number, self.means_.shape[1])).astype(self.means_.dtype)
        return self.means_[labels] + scale * noise, labels

"""Users who hop between sessions, with the theme of every item and session known, in LongCTR's layout.

Items belong to themes; a theme owns some of the categories and a centroid in image space. A user likes 2 to 4 themes
and lives through a chain of sessions, each on one of them and never twice in a row on the same one. A row shows an item
at some point of that chain, and whether it is clicked depends on the session at that point, on the themes of the
sessions just before it, on how often the user met the item's category, and a little on how popular the item is.

Histories are drawn before the rows, so a clicked row does not appear in any history. ``click_probability`` is what the
labels were drawn from, so its AUC (``ceiling_auc``) bounds every model from above. The bound is not quite reachable:
the theme of the current session is hidden and has to be read from its events, of which ``coherence`` tell the truth.
Events have times: minutes apart within a session, hours apart between two.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_zoo.errors import DataError
from model_zoo.pipeline.metrics import auc

Array = npt.NDArray  # dtypes are given where an array is made; numpy 1.26 and 2 type them differently

SPLITS = ("train", "valid", "test")
RECENT = 50  # events; a theme met in them still counts after its session is over
ZIPF = 0.8  # an item's weight within its theme is (popularity rank from 1) ** -ZIPF
STEP = 30, 600  # seconds between events of a session, from .. to
PAUSE = 4 * 3600, 48 * 3600  # seconds between sessions
FIRST = 1_700_000_000, 1_700_000_000 + 30 * 86_400  # when a user's first event is
# generators beside that of the seed alone, so that what they draw changes nothing else
TIMES, SESSION_THEMES = 1, 2
LOGITS = {"bias": -2.9, "session": 2.6, "recent": 0.9, "category": 0.2, "popularity": 0.15}


@dataclass(frozen=True)
class SyntheticSpec:
    """Sizes and knobs; an impossible one raises DataError."""

    users: int
    items: int  # item ids, including the padding row 0
    categories: int  # category ids, including the padding id 0
    image_dim: int
    themes: int
    rows: tuple[int, int, int]  # train, valid, test
    history_mean: float  # events a user, before the cut at history_max
    history_max: int
    session_length: float  # mean events a session (geometric); inf: a user's history is one session
    seed: int = 2024
    coherence: float = 0.9  # probability that an event is of its session's theme; otherwise it is of another one
    separation: float = 1.0  # distance of two themes' image centroids / distance of an item to its own (both rms)
    label_noise: float = 0.05  # probability that a label is a fair coin
    paired: bool = False  # sets that differ in session_length alone have the same items, users, and rows up to the target

    def __post_init__(self) -> None:
        needs = [
            (self.users >= 1, "users", "at least 1"),
            (self.image_dim >= 1, "image_dim", "at least 1"),
            (self.themes >= 2, "themes", "at least 2, or there is nothing to hop between"),
            (self.items > self.themes, "items", f"more than themes ({self.themes}), since row 0 is padding"),
            (self.categories > self.themes, "categories", f"more than themes ({self.themes}), since id 0 is padding"),
            (len(self.rows) == 3 and min(self.rows) >= 0 < self.rows[0], "rows", "three counts >= 0, the first >= 1"),
            (self.history_max >= 1, "history_max", "at least 1"),
            (1 <= self.history_mean <= self.history_max, "history_mean", f"from 1 to history_max ({self.history_max})"),
            (self.session_length >= 1, "session_length", "at least 1 (inf: no hopping)"),
            (self.seed >= 0, "seed", "at least 0"),
            (0 <= self.coherence <= 1, "coherence", "from 0 to 1"),
            (0 <= self.separation < float("inf"), "separation", "at least 0 and finite"),
            (0 <= self.label_noise <= 1, "label_noise", "from 0 to 1"),
            (self.users * self.history_mean < 2**30, "history_mean", "below 2**30 events over all users"),
        ]
        for holds, name, rule in needs:
            if not holds:
                raise DataError(f"The synthetic data's {name} is {getattr(self, name)}; it must be {rule}.")


MICROVIDEO = SyntheticSpec(
    users=10_986,
    items=24_323,
    categories=514,
    image_dim=64,
    themes=20,
    rows=(300_000, 50_000, 50_000),
    history_mean=300,
    history_max=1_200,
    session_length=12,
)
TINY = SyntheticSpec(
    users=200,
    items=301,
    categories=17,
    image_dim=16,
    themes=4,
    rows=(3_000, 600, 600),
    history_mean=40,
    history_max=120,
    session_length=6,
    separation=2.0,
)
HOPPING = SyntheticSpec(
    users=4_000,
    items=4_000,
    categories=60,
    image_dim=16,
    themes=5,
    rows=(60_000, 20_000, 40_000),
    history_mean=100,
    history_max=400,
    session_length=12.5,
    paired=True,
)
PRESETS = {"hopping": HOPPING, "microvideo": MICROVIDEO, "tiny": TINY}


@dataclass(frozen=True)
class Items:
    """Item columns, row = item_index; row 0 is padding (zeros, theme -1)."""

    cate_id: Array  # [items] int32
    image: Array  # [items, image_dim] float32
    theme: Array  # [items] int16
    popularity: Array  # [items] float64, probability among the items of its theme


@dataclass(frozen=True)
class Rows:
    """Impressions of one split [n], in the order of how far through their user's history they are."""

    user_index: Array  # int32
    item_index: Array  # int32
    seq_len: Array  # int32, from 1 to the length of the user's history
    is_click: Array  # int8
    click_probability: Array  # float64, what is_click was drawn from


@dataclass(frozen=True)
class SyntheticData:
    """User u's history is ``history[offsets[u]:offsets[u + 1]]``, oldest first; E events over all users."""

    spec: SyntheticSpec
    items: Items
    history: Array  # [E] int32 item_index
    offsets: Array  # [users + 1] int64
    session_id: Array  # [E] int32, counting over all users
    session_theme: Array  # [E] int16, the session's theme, whatever the event's own
    time: Array  # [E] int64 seconds, rising within a user
    rows: Mapping[str, Rows]  # by split


def generate(spec: SyntheticSpec) -> SyntheticData:
    """Draw a data set in memory; the same spec gives the same arrays.

    Within a user no train row is later (larger ``seq_len``) than a valid row, and no valid row later than a test row.
    """
    rng = np.random.default_rng(spec.seed)
    items = _draw_items(spec, rng)
    draw_item = _ItemSampler(items)

    lengths = np.rint(rng.gamma(1.5, spec.history_mean / 1.5, spec.users)).clip(1, spec.history_max).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts = rng.random(offsets[-1]) < 1 / spec.session_length
    starts[offsets[:-1]] = True
    session_id = np.cumsum(starts, dtype=np.int32) - 1
    liked, preference = _draw_preferences(spec, rng)
    dice = np.random.default_rng([spec.seed, SESSION_THEMES]) if spec.paired else rng
    session_theme = _draw_session_themes(starts, offsets, liked, preference, dice)[session_id]
    event_theme = _stray(session_theme, rng.random(len(starts)) >= spec.coherence, spec.themes, rng)
    history = draw_item(event_theme, rng)

    user, seq_len, split = _draw_moments(spec, lengths, rng)
    now = session_theme[offsets[user] + seq_len - 1]
    slot, slots = (liked[user] == now[:, None]).argmax(axis=1), (preference > 0).sum(axis=1)[user]
    other_liked = liked[user, _stray(slot, True, slots, rng)]
    anywhere = rng.integers(spec.themes, size=len(user))
    kind = rng.random(len(user))
    target = draw_item(np.where(kind < 0.5, now, np.where(kind < 0.75, other_liked, anywhere)), rng)

    event_user = np.repeat(np.arange(spec.users), lengths)
    position = np.arange(len(history)) - offsets[event_user]
    target_theme, target_cate = items.theme[target], items.cate_id[target]
    met = _Counter(event_user, session_theme, position, spec.themes, spec.history_max)
    recent = met.count(user, target_theme, np.maximum(seq_len - RECENT, 0), seq_len) > 0
    met = _Counter(event_user, items.cate_id[history], position, spec.categories, spec.history_max)
    repeats = met.count(user, target_cate, np.zeros_like(seq_len), seq_len)
    log_popularity = np.log(items.popularity[1:])
    fame = (np.log(items.popularity[target]) - log_popularity.mean()) / max(log_popularity.std(), 1e-9)
    logit = LOGITS["bias"] + LOGITS["category"] * np.log1p(repeats) + LOGITS["popularity"] * fame
    logit += np.where(target_theme == now, LOGITS["session"], LOGITS["recent"] * recent)
    probability = (1 - spec.label_noise) / (1 + np.exp(-logit)) + spec.label_noise / 2
    click = (rng.random(len(user)) < probability).astype(np.int8)

    rows = {}
    for number, name in enumerate(SPLITS):
        chosen = np.flatnonzero(split == number)
        chosen = chosen[np.argsort(seq_len[chosen] / lengths[user[chosen]], kind="stable")]
        columns = (user.astype(np.int32), target, seq_len.astype(np.int32), click, probability)
        rows[name] = Rows(*(column[chosen] for column in columns))
    event_time = _draw_times(starts, offsets, np.random.default_rng([spec.seed, TIMES]))
    return SyntheticData(spec, items, history, offsets, session_id, session_theme, event_time, rows)


def ceiling_auc(data: SyntheticData, split: str | None = None) -> float:
    """AUC of ``click_probability`` on a split, or on all rows; nan when only one class is there."""
    parts = [data.rows[split]] if split else list(data.rows.values())
    scores = np.concatenate([rows.click_probability for rows in parts])
    return auc(np.concatenate([rows.is_click for rows in parts]), scores)


class _ItemSampler:
    """Draws items of given themes by popularity: theme t's cumulative weights fill the interval from t to t + 1."""

    def __init__(self, items: Items) -> None:
        self.order = np.argsort(items.theme[1:], kind="stable") + 1
        theme = items.theme[self.order]
        self.last = np.searchsorted(theme, np.arange(theme[-1] + 1), side="right") - 1
        cumulative = np.cumsum(items.popularity[self.order])
        self.edges = theme + (cumulative - np.concatenate([[0], cumulative[self.last]])[theme])

    def __call__(self, theme: Array, rng: np.random.Generator) -> Array:
        found = np.searchsorted(self.edges, theme + rng.random(len(theme)), side="right")
        found = np.minimum(found, self.last[theme])  # the sum may have been rounded up to the next theme
        return self.order[found].astype(np.int32)


class _Counter:
    """How often a user met a value in a range of positions: events sorted by (user, value, position), then bisected."""

    def __init__(self, user: Array, value: Array, position: Array, values: int, longest: int) -> None:
        self.values, self.stride = values, longest + 1
        self.keys = np.sort(self._key(user, value, position))

    def _key(self, user: Array, value: Array, position: Array) -> Array:
        return (user.astype(np.int64) * self.values + value) * self.stride + position

    def count(self, user: Array, value: Array, first: Array, end: Array) -> Array:
        """Events of ``value`` [n] at positions ``first <= position < end`` of ``user`` [n]."""
        upto, before = (np.searchsorted(self.keys, self._key(user, value, at)) for at in (end, first))
        return upto - before


def _draw_items(spec: SyntheticSpec, rng: np.random.Generator) -> Items:
    """Themes of equal size, categories dealt to the themes in turn, image = centroid + noise."""
    theme = rng.permutation(np.arange(spec.items - 1) % spec.themes)
    own = (spec.categories - 2 - theme) // spec.themes + 1  # categories 1 + theme, 1 + theme + themes, ...
    cate = 1 + theme + spec.themes * (rng.random(len(theme)) * own).astype(np.int64)
    by_theme = np.argsort(theme, kind="stable")
    rank = np.empty(len(theme), np.int64)
    rank[by_theme] = np.arange(len(theme)) - np.searchsorted(theme[by_theme], theme[by_theme])
    weight = (rank + 1.0) ** -ZIPF
    popularity = weight / np.bincount(theme, weights=weight)[theme]
    centroids = rng.normal(scale=spec.separation / np.sqrt(2 * spec.image_dim), size=(spec.themes, spec.image_dim))
    image = centroids[theme] + rng.normal(scale=1 / np.sqrt(spec.image_dim), size=(len(theme), spec.image_dim))
    return Items(
        cate_id=np.concatenate([[0], cate]).astype(np.int32),
        image=np.vstack([np.zeros(spec.image_dim), image]).astype(np.float32),
        theme=np.concatenate([[-1], theme]).astype(np.int16),
        popularity=np.concatenate([[0.0], popularity]),
    )


def _draw_preferences(spec: SyntheticSpec, rng: np.random.Generator) -> tuple[Array, Array]:
    """Liked themes [users, 4 or fewer] int16 and their weights; a user's weights are zero from some column on."""
    most = min(4, spec.themes)
    liked = np.argsort(rng.random((spec.users, spec.themes)), axis=1)[:, :most].astype(np.int16)
    weight = 0.25 + rng.exponential(size=(spec.users, most))
    number = rng.integers(2, most + 1, size=spec.users)
    return liked, weight * (np.arange(most) < number[:, None])


def _draw_session_themes(
    starts: Array, offsets: Array, liked: Array, preference: Array, rng: np.random.Generator
) -> Array:
    """Theme of every session [S] int16: by preference, the theme of the user's session before excluded."""
    first = (np.cumsum(starts) - 1)[offsets[:-1]]
    sessions = np.diff(np.concatenate([first, [starts.sum()]]))
    themes = np.empty(starts.sum(), np.int16)
    previous = np.full(len(first), -1)
    columns = np.arange(liked.shape[1])
    for step in range(sessions.max()):
        users = np.flatnonzero(sessions > step)
        upto = np.cumsum(preference[users] * (columns != previous[users, None]), axis=1)
        slot = (rng.random(len(users))[:, None] * upto[:, -1:] >= upto).sum(axis=1)
        themes[first[users] + step] = liked[users, slot]
        previous[users] = slot
    return themes


def _draw_times(starts: Array, offsets: Array, rng: np.random.Generator) -> Array:
    """Seconds [E] int64: `STEP` between events of a session, `PAUSE` before a new one."""
    steps, pauses = rng.integers(*STEP, size=len(starts)), rng.integers(*PAUSE, size=len(starts))
    elapsed = np.cumsum(np.where(starts, pauses, steps))
    first = rng.integers(*FIRST, size=len(offsets) - 1) - elapsed[offsets[:-1]]
    return elapsed + np.repeat(first, np.diff(offsets))


def _stray(number: Array, strays: Array | bool, count: Array | int, rng: np.random.Generator) -> Array:
    """``number``, but where ``strays`` any other of 0 .. count - 1 with equal chances (count is 2 or more)."""
    return (number + strays * rng.integers(1, count, size=len(number))) % count


def _draw_moments(spec: SyntheticSpec, lengths: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """user, seq_len and split number [n] of every row; a user's moments go to the splits in time order."""
    split = np.repeat(np.arange(3), spec.rows)
    user = rng.integers(spec.users, size=len(split))
    moment = 1 + (rng.random(len(split)) * lengths[user]).astype(np.int64)
    seq_len = np.empty_like(moment)
    seq_len[np.lexsort((split, user))] = moment[np.lexsort((moment, user))]
    return user, seq_len, split

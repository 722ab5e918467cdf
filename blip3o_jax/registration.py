"""How far a picture is shifted, and zoomed, against another: the peaks of their correlations."""

import numpy as np

STEPS = 20  # places a pixel at which a shift is looked for
SOFT = 2  # px over which a region is blended out
# Two pictures are compared in this many blocks along a side, which overlap, of half a side each.
BLOCKS = 3
CLEAR = 0.15  # height of a peak that stands out; that of equal blocks is near 1
AGREEMENT = 0.5  # px by which blocks that agree differ at most
LEAST_BLOCKS = 3  # that agree
FARTHEST = 1 / 8  # of a side: what seems shifted further shows something else
MOST_ZOOM = 0.1
PASS = 0.25  # cycles a pixel: the scale of the frequencies that count


def shift(image: np.ndarray, reference: np.ndarray, region: np.ndarray) -> float:
    """How many pixels an image uint8 [H,W,3] is shifted against a reference, to 1/20, where a
    region, bool [H,W], is blended out of both.

    It is the peak of their cross-correlation. NaN where nothing is left to compare.
    """
    # What stands out from the commonest colour outside, fading into the region; then zeros, as
    # shifts are not cyclic.
    if region.all():
        return float("nan")
    height, width = region.shape
    weight = _faded(~region)[..., None]
    spectra = []
    for picture in (image, reference):
        content = (picture - np.median(picture[~region], axis=0)) * weight / 255
        spectra.append(np.fft.fft2(content, (2 * height, 2 * width), axes=(0, 1)))
    place, correlation = _peak((spectra[0] * spectra[1].conj()).sum(axis=-1))
    return float(np.hypot(*place)) if correlation > 0 else float("nan")


def register(image: np.ndarray, reference: np.ndarray) -> tuple[float, float] | None:
    """How many pixels an image uint8 [S,S,3] is shifted against a reference, and by how much it is
    zoomed, 0.01 if it is 1 % larger. None where they do not show the same.

    Each block that has a peak of its own is moved by shift + zoom * its place; medians over blocks
    and over pairs of blocks leave out those that an edit changed. By phase correlation, which
    neither a tint nor a new style moves.
    """
    # Without the whole pixels of a first estimate.
    size, pictures = len(image), [picture.mean(axis=2) for picture in (image, reference)]
    start = np.rint(_phase_peak(*pictures)[0]).astype(int)
    start = start if np.abs(start).max() <= FARTHEST * size else 0 * start
    one, other = (_without(p, way * start) for p, way in zip(pictures, (1, -1), strict=True))
    # Where the blocks went.
    half, places, moves = np.array(one.shape) // 2, [], []
    for block in np.ndindex(BLOCKS, BLOCKS):
        corner = np.array(block) * (one.shape - half) // (BLOCKS - 1)
        cut = tuple(slice(at, at + length) for at, length in zip(corner, half, strict=True))
        move, height = _phase_peak(one[cut], other[cut])
        if height >= CLEAR and np.abs(move).max() <= half.min() / 4:
            places.append(corner + half / 2 - np.array(one.shape) / 2)
            moves.append(move)
    if len(moves) < LEAST_BLOCKS:
        return None
    # The zoom moves those that lie apart by different ways.
    slopes = []
    for along, moved in zip(np.transpose(places), np.transpose(moves), strict=True):
        distances = np.subtract.outer(along, along)
        slopes.append(np.subtract.outer(moved, moved)[distances > 0] / distances[distances > 0])
    zoom = float(np.median(np.concatenate(slopes)))
    shifts = np.array(moves) - zoom * np.array(places)
    common = np.median(shifts, axis=0)
    # Most must agree.
    agreeing = (np.abs(shifts - common).max(axis=1) <= AGREEMENT).sum()
    if agreeing < max(LEAST_BLOCKS, len(moves) / 2) or abs(zoom) > MOST_ZOOM:
        return None
    return float(np.hypot(*(start + common))), zoom


def _peak(cross: np.ndarray) -> tuple[np.ndarray, float]:
    """The place (down, right) and the height of the peak of a correlation, of which `cross` is the
    spectrum [H,W]: the best whole pixel by FFT, then on a finer grid by a Fourier sum."""
    # The best whole pixel, of shifts to both sides.
    correlation = np.fft.ifft2(cross).real
    peak = np.unravel_index(correlation.argmax(), correlation.shape)
    # The best place around it.
    fine = np.arange(-STEPS, STEPS + 1) / STEPS
    frequencies = [np.fft.fftfreq(size) for size in cross.shape]
    places = [
        (at + size // 2) % size - size // 2 + fine
        for at, size in zip(peak, cross.shape, strict=True)
    ]
    rows, columns = (
        np.exp(2j * np.pi * np.outer(place, frequency))
        for place, frequency in zip(places, frequencies, strict=True)
    )
    best = (rows @ cross @ columns.T).real
    i, j = np.unravel_index(best.argmax(), best.shape)
    return np.array([places[0][i], places[1][j]]), float(best[i, j])


def _phase_peak(image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, float]:
    """`_peak` of the phase correlation of two grey pictures [H,W], 1 high where they are equal."""
    # Faded out towards the border, as shifts are not cyclic.
    window = np.outer(*(np.hanning(size + 2)[1:-1] for size in image.shape))
    spectra = []
    for picture in (image, reference):
        content = picture - (picture * window).sum() / window.sum()
        spectra.append(np.fft.fft2(content * window))
    cross = spectra[0] * spectra[1].conj()
    # Of each frequency its phase, unless there is next to nothing of it.
    power = np.prod([np.sqrt(np.square(np.abs(spectrum)).mean()) for spectrum in spectra])
    phase = cross / (np.abs(cross) + 0.02 * power + 1e-9)
    down, right = (np.fft.fftfreq(size) for size in image.shape)
    low = np.exp(-np.add.outer(np.square(down), np.square(right)) / (2 * PASS**2))
    return _peak(phase * low / low.sum())


def _without(picture: np.ndarray, start: np.ndarray) -> np.ndarray:
    """A picture [H,W] without its first `start` (rows, columns), or its last where negative."""
    return picture[tuple(slice(max(n, 0), min(n, 0) or None) for n in start)]


def _faded(mask: np.ndarray) -> np.ndarray:
    """A mask [H,W] that falls to 0 over SOFT px inside its edges with the rest."""
    faded = np.zeros(mask.shape)
    for reach in range(SOFT + 1):
        padded = np.pad(mask, reach, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2)
        faded += windows.all(axis=(2, 3)) / (SOFT + 1)
    return faded

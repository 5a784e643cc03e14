"""Right and wrong answers to the exercises on scaling out; test_exercises.py tries them."""

FRAME = 14 + 4 * 7_850


def last(arrived):
    return max((round for round, there in enumerate(arrived, 1) if there), default=0)


RIGHT = {"09-2": [100_000 * FRAME, float(100_000 * FRAME)], "09-1": [last]}
WRONG = {
    "09-2": [
        (FRAME, "one client's payload"),
        (100_000 * 4 * 7_850, "begins with a header"),
        (100_000 * 7_850, "four bytes a number"),
        (100_000 * (FRAME + 1), "belongs to a broadcast"),
        (800_000 * FRAME, "in bits"),
        (200_000 * FRAME, "both directions"),
        (3, "A payload is a header"),
        ("lots", "one whole number of bytes"),
    ],
    "09-1": [
        (lambda a: last(a) - 1, "counted from 1"),
        (lambda a: sum(a, 0), "counts the answers"),
        (len, "lost on its way"),
        (lambda a: 99, "it should be 3, not 99"),
        (lambda a: None, "returns nothing yet"),
        (lambda a: a[-1] + "x", "raised TypeError"),
        (7, "Give the function itself"),
    ],
}

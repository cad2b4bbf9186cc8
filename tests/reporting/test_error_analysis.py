import numpy as np

from wsss_hf.metrics.errors import Errors, compare_errors
from wsss_hf.reporting.error_analysis import errors_markdown


def errors_of(predictions, truth):
    errors = Errors(["background", "cat", "dog"])
    for number, prediction in enumerate(predictions):
        errors.add(prediction, truth, f"image {number}")
    return errors.compute()


def test_markdown_has_the_figures_of_both_and_their_difference():
    truth = np.zeros((6, 8), dtype=np.uint8)
    truth[1:4, 1:4], truth[2:5, 5:8] = 1, 2
    weak, full = truth.copy(), truth.copy()
    weak[1:3], full[1] = 0, 0
    comparison = compare_errors(errors_of([weak, full], truth), errors_of([full, truth], truth))
    text = errors_markdown(comparison, "weak", "full")
    assert text.startswith(f"weak reaches {100 * comparison['ratio']:.1f} % of the mean IoU of full (95 % interval ")
    first, second = comparison["model"]["iou"]["dog"], comparison["other"]["iou"]["dog"]
    assert f"| IoU of dog | {100 * first:.1f} | {100 * second:.1f} | {100 * (first - second):.1f} |" in text
    share = comparison["model"]["errors"]["objects taken for background"]["share"]
    assert share > 0 and f"| wrong pixels, objects taken for background | {100 * share:.1f} |" in text

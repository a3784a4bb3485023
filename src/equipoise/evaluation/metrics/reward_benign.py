"""Mean reward on benign prompts: does the judge like the answers to safe prompts that only look unsafe."""

from equipoise.evaluation.metrics._base import reward_metric

METRIC = reward_metric("benign", "Reward on benign prompts")

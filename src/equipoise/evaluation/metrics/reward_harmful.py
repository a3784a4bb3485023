"""Mean reward on harmful prompts: how the judge likes what the model answers to harmful prompts, with no threshold in between."""

from equipoise.evaluation.metrics._base import reward_metric

METRIC = reward_metric("harmful", "Reward on harmful prompts")

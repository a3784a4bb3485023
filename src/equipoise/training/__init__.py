"""One Trainer for every objective, behind `fit`."""

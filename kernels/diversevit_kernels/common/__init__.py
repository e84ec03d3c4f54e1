"""Code that both backends share: dtypes, groups of the penalty, environment switches, forks."""

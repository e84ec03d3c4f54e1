"""Timings: implementations of an operator or step in turn, in one process, after their results were checked.

A ratio is the median over rounds of the ratios within a round.
"""

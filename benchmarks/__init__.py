"""Throughput on fixed workloads."""

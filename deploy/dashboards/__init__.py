"""Grafana's boards, made by code: `make dashboards` writes them to deploy/k8s/components/monitoring/dashboards.

A panel's number never changes once alerts point to it: a new panel takes a new number of its row's ten.
"""

"""The package that a program embeds: the scheduler, leases, status and fit."""

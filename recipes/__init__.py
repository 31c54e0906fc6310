# SPDX-License-Identifier: Apache-2.0
"""The recipes that come with the library: one YAML file each; `lightning-robust list` shows them."""

__all__: list[str] = []

"""A CA that nobody trusts, and what it has signed: localhost, 127.0.0.1 and ::1, valid for a hundred years."""

from pathlib import Path

CA = str(Path(__file__).parent / "ca.pem")
LOCALHOST = str(Path(__file__).parent / "localhost.pem")  # certificate and key

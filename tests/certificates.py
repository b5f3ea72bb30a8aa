"""Certificates for the tests that speak TLS."""

from __future__ import annotations

import datetime as dt
import ipaddress

from tasks.store.files import write_whole


def certificate(folder, name: str) -> tuple[str, str]:
    """Replace a self-signed certificate and its key by renames; return their paths."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string(f"CN={name}")
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(minutes=5))
    builder = builder.not_valid_after(now + dt.timedelta(days=1))
    builder = builder.add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
    )
    plain = serialization.NoEncryption()
    files = {
        "key.pem": key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain),
        "certificate.pem": builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
    }
    for file, content in files.items():
        write_whole(folder / file, content, mode=0o600)
    return str(folder / "certificate.pem"), str(folder / "key.pem")

"""TensorBoard's records, and what a training cost by declared factors."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tasks.registry.efficiency import Factors, costs_of, efficiency_table, energy_of
from tasks.registry.tensorboard import EventFile, masked_crc

pytestmark = pytest.mark.timeout(30)
FACTORS = Factors(core_watts=20, co2_grams_per_kwh=500, price_per_kwh=0.4)
LINE = {"seconds": 10.0, "samples_per_second": 100.0, "cpu_seconds": 18.0, "cpu_busy_ratio": 0.9, "mfu": 0.5}
LINE |= {"data_wait_ratio": 0.01, "wire_bytes": 5e6, "memory_bytes": 3e8}


def test_energy_is_counted_where_it_can_be_and_else_estimated_in_words():
    assert energy_of(LINE, FACTORS) == (360.0, "estimate: processor seconds at 20 W a core")
    assert energy_of(LINE | {"joules_rapl": 512.0}, FACTORS) == (512.0, "rapl")
    assert energy_of(LINE | {"joules_nvml": 99.0, "joules_rapl": 512.0}, FACTORS) == (99.0, "nvml")


def test_costs_follow_from_the_factors():
    found = costs_of([LINE, LINE], FACTORS)
    assert found["energy_kwh"] == pytest.approx(720 / 3.6e6)
    assert found["co2_grams"] == pytest.approx(720 / 3.6e6 * 500)
    assert found["energy_cost"] == pytest.approx(720 / 3.6e6 * 0.4)
    assert found["samples_per_joule"] == pytest.approx(2000 / 720)


def test_the_table_weighs_epochs_by_their_time():
    slow = LINE | {"seconds": 30.0, "mfu": 0.1}
    rows = {row[1]: row[2] for row in efficiency_table([LINE, slow], FACTORS)["data"]}
    assert rows["model's operations of the measured matrix-product peak (MFU)"] == pytest.approx(0.2)
    assert rows["sent by all ranks for gradients and weights"] == pytest.approx(1e7 / 40 / 1e6)
    assert "estimate: processor seconds at 20 W a core" in rows


def test_the_checksum_is_castagnolis_masked():
    # RFC 3720, B.4: 32 bytes of zeros have CRC-32C 0x8a9136aa.
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_events_are_records_that_verify(tmp_path: Path):
    events = EventFile(tmp_path)
    events.add({"loss": 0.25, "accuracy": 0.5}, 300, 1_700_000_000.5)
    content, records = events.path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12])[0] == masked_crc(content[:8])
        record = content[12 : 12 + length]
        assert struct.unpack("<I", content[12 + length : 16 + length])[0] == masked_crc(record)
        records.append(record)
        content = content[16 + length :]
    assert b"brain.Event:2" in records[0]
    # field 1: the time, 64 bits; field 2: the step, 300 as a varint; field 5: the summary.
    assert records[1][:9] == b"\x09" + struct.pack("<d", 1_700_000_000.5)
    assert records[1][9:13] == b"\x10\xac\x02\x2a"
    assert b"\x0a\x04loss\x15" + struct.pack("<f", 0.25) in records[1]

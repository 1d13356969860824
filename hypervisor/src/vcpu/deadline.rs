//! The TSC deadline timer over an update: no deadline may be lost, or an idle vCPU never wakes up again.

use kvm_bindings::kvm_lapic_state;

/// Offsets of registers in the LAPIC's page (SDM 3A, 12.4.1): the interrupt request register's first word, and the
/// timer's vector.
const IRR: usize = 0x200;
const LVTT: usize = 0x320;
const LVT_MASKED: u32 = 1 << 16;
const TIMER_MODE: u32 = 3 << 17;
const TIMER_MODE_DEADLINE: u32 = 2 << 17;

/// A deadline that has long passed.
const NOW: u64 = 1;

/// What IA32_TSC_DEADLINE is to be set to.
///
/// 0 says that the timer is not armed: the guest has disarmed it, or it has fired. One that fired is in the interrupt
/// request register, if that was read after the MSR; states of earlier builds have them the other way round, and a
/// timer that fired in between, as the VMX preemption timer does where a vCPU is loaded (start_hv_timer), is in
/// neither. So where one could be missing it fires now. A guest that has disarmed its timer then gets an interrupt
/// more, at most one an update: software must be ready for it in any case, as a timer may fire while it is being
/// disarmed (SDM 3A, 12.5.4.1).
pub(super) fn to_restore(lapic: &kvm_lapic_state, saved: u64) -> u64 {
    let timer = register(lapic, LVTT);
    let vector = timer as usize & 0xFF;
    // A LAPIC that nobody has programmed is in one-shot mode, and masked.
    let may_fire = timer & TIMER_MODE == TIMER_MODE_DEADLINE && timer & LVT_MASKED == 0;
    let has_fired = register(lapic, IRR + vector / 32 * 16) & 1 << (vector % 32) != 0;
    if saved == 0 && may_fire && !has_fired { NOW } else { saved }
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let byte = |at: usize| lapic.regs.get(offset + at).map_or(0, |byte| *byte as u8);
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lapic(registers: &[(usize, u32)]) -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        for (offset, value) in registers {
            for (at, byte) in value.to_le_bytes().into_iter().enumerate() {
                lapic.regs[offset + at] = byte as _;
            }
        }
        lapic
    }

    #[test]
    fn a_timer_that_may_have_fired_unseen_fires_now() {
        let armed = TIMER_MODE_DEADLINE | 0xEC;
        assert_eq!(to_restore(&lapic(&[(LVTT, armed)]), 0), NOW);
        // 0xEC = 7 * 32 + 12.
        assert_eq!(to_restore(&lapic(&[(LVTT, armed), (IRR + 0x70, 1 << 12)]), 0), 0, "it is in the request register");
        assert_eq!(to_restore(&lapic(&[(LVTT, armed), (IRR + 0x70, 1 << 11)]), 0), NOW, "that is another vector");
        assert_eq!(to_restore(&lapic(&[(LVTT, armed)]), 77), 77, "still armed");
    }

    #[test]
    fn a_timer_that_cannot_fire_is_left_alone() {
        for timer in [0, 0x1_0000, 0xEC, 1 << 17 | 0xEC, TIMER_MODE_DEADLINE | LVT_MASKED | 0xEC] {
            assert_eq!(to_restore(&lapic(&[(LVTT, timer)]), 0), 0, "{timer:#x}");
        }
    }
}

//! The in-kernel PICs and the IOAPIC.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, Vm};

/// What they hold, as KVM gives it. The LAPICs are their vCPUs'.
#[derive(Serialize, Deserialize)]
pub struct IrqchipState {
    /// PIC master, PIC slave, IOAPIC.
    pub chips: Vec<kvm_irqchip>,
}

impl Vm {
    /// Changes nothing (KVM_GET_IRQCHIP). An interrupt that is raised afterwards is not in it.
    pub fn save_irqchip(&self) -> Result<IrqchipState> {
        let chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                self.fd().get_irqchip(&mut chip).map_err(Error::call(format!("KVM_GET_IRQCHIP {chip_id}")))?;
                Ok(chip)
            })
            .collect::<Result<_>>()?;
        Ok(IrqchipState { chips })
    }

    /// Gives back what was saved (KVM_SET_IRQCHIP), chip by chip.
    pub fn restore_irqchip(&self, state: &IrqchipState) -> Result<()> {
        for chip in &state.chips {
            self.fd().set_irqchip(chip).map_err(Error::call(format!("KVM_SET_IRQCHIP {}", chip.chip_id)))?;
        }
        Ok(())
    }
}

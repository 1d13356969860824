//! A list of system calls, some of them with some arguments only.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// By number; empty: whatever the arguments are.
#[derive(Clone, Default)]
pub(super) struct Rules(BTreeMap<i64, Vec<SeccompRule>>);

/// What an argument has to be.
#[derive(Clone, Copy)]
pub(super) enum Is {
    /// An int.
    Int(i32),
    /// All of its 64 bits.
    Word(u64),
    /// An int with these bits, of those of the mask.
    Bits { mask: u32, value: u32 },
}

impl Rules {
    pub(super) fn any(&mut self, calls: &[i64]) {
        for call in calls {
            self.0.insert(*call, Vec::new());
        }
    }

    /// Where all of these arguments are so. The order of calls with the same number is that of the filter.
    pub(super) fn when(&mut self, call: i64, arguments: &[(u8, Is)]) {
        // None of this fails for a constant list that is not empty, of indices below 6; what did would allow nothing.
        let conditions: Option<Vec<_>> = arguments.iter().map(|(index, is)| is.condition(*index)).collect();
        let Some(Ok(rule)) = conditions.map(SeccompRule::new) else { return };
        match self.0.get_mut(&call) {
            Some(rules) if rules.is_empty() => {}
            Some(rules) => rules.push(rule),
            None => drop(self.0.insert(call, vec![rule])),
        }
    }

    /// All that the other allows, too.
    pub(super) fn and(&mut self, other: &Self) {
        for (call, rules) in &other.0 {
            match self.0.get_mut(call) {
                Some(own) if own.is_empty() => {}
                Some(own) if !rules.is_empty() => {
                    let more: Vec<_> = rules.iter().filter(|rule| !own.contains(rule)).cloned().collect();
                    own.extend(more);
                }
                _ => drop(self.0.insert(*call, rules.clone())),
            }
        }
    }

    pub(super) fn program(
        self,
        other: SeccompAction,
        matching: SeccompAction,
    ) -> Result<BpfProgram, seccompiler::Error> {
        let filter = SeccompFilter::new(self.0, other, matching, TargetArch::x86_64)?;
        Ok(filter.try_into()?)
    }
}

impl Is {
    fn condition(self, index: u8) -> Option<SeccompCondition> {
        let (len, operator, value) = match self {
            Self::Int(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(value as u32)),
            Self::Word(value) => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value),
            Self::Bits { mask, value } => (SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask.into()), value.into()),
        };
        SeccompCondition::new(index, len, operator, value).ok()
    }
}

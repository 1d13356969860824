//! Before the pause, while the guest runs: everything that is slow or can be refused. On a thread of its own, as it
//! opens what a caller names and waits for what that does; the machine itself is looked at before, by the thread that
//! owns it.

use std::any::Any;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use theseus_api::types::{BuildInfo, UpdateEvent, UpdateOutcome, UpdateRequest};
use theseus_devices::device::Operation;
use theseus_resources::Pages;

use super::preflight::{self, Requirements};
use super::rehearsed::{NotRehearsed, Rehearsed, rehearse};
use super::rights::{Image, Wants};
use super::sealed::Blank;
use super::standby::{NotStarted, Standby};
use super::target::{self, Rehearsal, Target, Unfit};
use super::{NotUpdated, UpdateContext, UpdateError, back_to};
use crate::build_info;
use crate::events::EventStream;
use crate::keeper::watch::MayBeAlone;
use crate::keeper::{self, Keeper, settings};
use crate::main_thread::MainThread;
use crate::panics::panic_text;
use crate::supervisor::Supervisor;
use crate::timeline::{Phase, Timeline};

/// An update that was asked for, with all that is to be known of the machine.
pub(crate) struct Order {
    request: UpdateRequest,
    keeper: Arc<Keeper>,
    main: MainThread,
    supervisor: Supervisor,
    events: EventStream,
    timeline: Arc<Timeline>,
    /// The timeline's.
    page: OwnedFd,
    /// Reasons against it so far.
    reasons: Vec<String>,
    needs: Requirements,
    rehearsed: Result<Rehearsed, NotRehearsed>,
    /// The guest wants its end instead.
    given_up: Arc<AtomicBool>,
}

/// What there is to go back to.
pub(crate) struct WayBack {
    pub keeper: Arc<Keeper>,
    pub supervisor: Supervisor,
    /// The running program: the keeper can become it again even if its file is replaced or deleted.
    pub program: File,
    /// The keeper may die of becoming the new image.
    pub alone: MayBeAlone,
}

/// The new VMM waits for the guest.
pub(crate) struct Ready {
    pub to: BuildInfo,
    pub target: PathBuf,
    pub timeline: Arc<Timeline>,
    pub new: Standby,
    pub back: WayBack,
}

impl Order {
    /// `given_up`: see there.
    pub(crate) fn new(
        subject: &UpdateContext<'_>,
        request: &UpdateRequest,
        given_up: Arc<AtomicBool>,
    ) -> Result<Self, NotUpdated> {
        settings::take_over_limits();
        let (timeline, page) = Timeline::new(subject.host.seams.clone()).map_err(cannot_prepare)?;
        timeline.stamp(Phase::Start);
        let mut reasons = Vec::new();
        if !keeper::is_there() {
            reasons.push(
                "the keeper of this VMM was killed in an earlier update: there is nobody to start a new one".into(),
            );
        }
        let mut needs = Requirements::default();
        if let Some(machine) = &subject.machine {
            reasons.extend(machine.blockers(Operation::Update));
            needs = Requirements {
                placements: machine.vcpus.placements(),
                ram: machine.memory_size(),
                small_pages: machine.ram.pages() == Pages::Small,
            };
        }
        let rehearsed = rehearse(subject, &needs);
        Ok(Self {
            request: request.clone(),
            keeper: subject.keeper.clone(),
            main: subject.main.clone(),
            supervisor: subject.supervisor.clone(),
            events: subject.events.clone(),
            timeline: Arc::new(timeline),
            page,
            reasons,
            needs,
            rehearsed,
            given_up,
        })
    }

    /// Refuses with every reason there is, or has the keeper become the new image and the new VMM make itself ready.
    pub(crate) fn carry_out(self) -> Result<Ready, NotUpdated> {
        let program = File::open("/proc/self/exe").map_err(cannot_prepare)?;
        let Self { request, keeper, main, supervisor, events, timeline, page, reasons, needs, rehearsed, given_up } =
            self;
        let mut reasons = reasons;
        reasons.extend(preflight::reasons(&needs));
        reasons.extend(crate::logging::stands_still());
        let target = Target::open(&request, build_info::this(), &supervisor);
        let target = target.map_err(|more| reasons.extend(more.iter().map(Unfit::to_string))).ok();
        let rehearsed = rehearsed.map_err(|reason| reasons.push(reason.to_string())).ok();
        let (mut images, mut takes_ahead) = (Vec::new(), false);
        if let (Some(target), Some(rehearsed)) = (&target, &rehearsed) {
            let Rehearsal { reasons: more, capabilities, takes_ahead: takes } =
                target::ask(target, &rehearsed.bytes, &main);
            takes_ahead = takes;
            reasons.extend(more.iter().map(Unfit::to_string));
            let image = |has| Image::new("the new image", &target.path, &target.file, has);
            images.extend(capabilities.map(image));
        }
        match Wants::of_this_process(&needs.placements) {
            Ok(wants) => reasons.extend(wants.reasons(&images)),
            Err(error) => {
                let remedy = preflight::remedy(&error);
                reasons.push(format!("the rights of this process cannot be read: {error}: {remedy}"));
            }
        }
        let (target, rehearsed) = match (target, rehearsed) {
            (Some(target), Some(rehearsed)) if reasons.is_empty() => (target, rehearsed),
            (target, _) => return Err(NotUpdated::refused(target.map(|target| target.build), reasons)),
        };
        log::info!("update to {}: prepared", target::describe(&target.path, &target.build));
        crate::heap::warm(needs.placements.len());
        let to = target.build.clone();
        let passed = timeline.pass(Phase::Prepare).map_err(UpdateError::from);
        if let Err(error) = passed.and_then(|()| Ok(target.unchanged()?)) {
            return Err(NotUpdated::refused(Some(to), vec![error.to_string()]));
        }
        if request.dry_run {
            let (outcome, reasons) = (UpdateOutcome::Ready, Vec::new());
            return Err(NotUpdated { outcome, to: Some(to), reasons, timeline: Some(timeline) });
        }
        events.emit(UpdateEvent::Prepared { to: to.clone() });
        let back = WayBack { keeper, supervisor, program, alone: MayBeAlone::new() };
        let new = || stand_by(&target, &back, &page, &timeline, &rehearsed, given_up, takes_ahead);
        let half = |panic: Box<dyn Any + Send>| NotStarted {
            reason: UpdateError::Panic(panic_text(&*panic)),
            is_whole: false,
        };
        match catch_unwind(AssertUnwindSafe(new)).map_err(half).flatten() {
            Ok(new) => Ok(Ready { to, target: target.path, timeline, new, back }),
            Err(NotStarted { reason, is_whole }) => Err(back_to(back, Some(to), timeline, reason, is_whole, None)),
        }
    }
}

/// The keeper becomes the new image, and the VMM that it starts makes itself ready.
fn stand_by(
    target: &Target,
    back: &WayBack,
    page: &OwnedFd,
    timeline: &Arc<Timeline>,
    rehearsed: &Rehearsed,
    given_up: Arc<AtomicBool>,
    takes_ahead: bool,
) -> Result<Standby, NotStarted> {
    let whole = |reason| NotStarted { reason, is_whole: true };
    timeline.become_other().map_err(|error| whole(error.into()))?;
    // Whoever comes from here on waits, or meets the exec itself.
    target.unchanged().map_err(UpdateError::from).map_err(whole)?;
    let blank = Blank::new("saved-state", rehearsed.room)
        .map_err(|error| whole(UpdateError::Memory { remedy: preflight::remedy(&error), source: error }))?;
    let (program, page, timeline) = (target.file.as_fd(), page.as_fd(), timeline.clone());
    let new = Standby::start(&back.keeper, program, page, timeline, given_up, blank, takes_ahead)?;
    new.prewarm(rehearsed).map_err(|reason| NotStarted { reason, is_whole: false })?;
    Ok(new)
}

fn cannot_prepare(error: std::io::Error) -> NotUpdated {
    NotUpdated::refused(None, vec![format!("cannot prepare: {error}: {}", preflight::remedy(&error))])
}

//! Programs carried out with tokens in place of activations: stages with a compute queue, buffers and
//! slots as workers have them, and two transports.

use mp_train::pipeline::schedule::{Action, Flow, Operation, Schedule};

#[derive(Clone, Copy, Debug)]
pub enum Transport {
    /// The host posts everything at once; each flow's exchanges happen in order and in pairs.
    Grouped,
    /// The host carries out one operation after the other, and stops at a post until the last message of
    /// its flow was taken.
    Mailbox,
}

/// Which stage gets to move.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// The lowest stage that can, as far as it can.
    FirstStageFirst,
    /// The highest stage that can, as far as it can.
    LastStageFirst,
    /// Any, a few moves at a time.
    Random(u64),
}

/// What an action makes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Token {
    flow: Flow,
    micro_batch: usize,
    /// Virtual stage that made it.
    made_by: usize,
}

/// The buffers of one flow of a stage.
#[derive(Default)]
struct Mail {
    incoming: Option<Token>,
    /// Two, by turns: one is sent while the other is written.
    outgoing: [Option<Token>; 2],
    /// Messages computed so far.
    made: usize,
    /// Messages of those that the receiver has.
    taken: usize,
    /// Mailbox: whom the message that lies there is for.
    addressee: Option<usize>,
}

/// An exchange in the queue of its flow.
#[derive(Clone, Copy)]
struct Queued {
    /// Actions computed before it begins.
    after: usize,
    send: Option<usize>,
    receive: Option<(usize, Action)>,
}

#[derive(Default)]
struct Stage {
    /// Next operation: of the host (mailbox) or of the compute queue (grouped).
    next: usize,
    computed: usize,
    mail: [Mail; 2],
    /// Per flow, all exchanges in order, how many of them stand before `next`, and how many are done.
    queues: [Vec<Queued>; 2],
    passed: [usize; 2],
    exchanged: [usize; 2],
    /// Per chunk, the micro-batch in each slot.
    slots: Vec<Vec<Option<usize>>>,
    /// Per chunk, micro-batches seen forwards and backwards.
    seen: Vec<[usize; 2]>,
}

pub struct World<'a> {
    schedule: &'a Schedule,
    transport: Transport,
    /// What each stage does; a test may plant faults here before it runs.
    pub programs: Vec<Vec<Operation>>,
    stages: Vec<Stage>,
}

type Moved = Result<bool, String>;

impl<'a> World<'a> {
    pub fn new(schedule: &'a Schedule, transport: Transport) -> Self {
        let stage = |rank| Stage {
            slots: (0..schedule.virtual_stages)
                .map(|chunk| vec![None; schedule.slots(rank, chunk)])
                .collect(),
            seen: vec![[0; 2]; schedule.virtual_stages],
            ..Stage::default()
        };
        let ranks = 0..schedule.stages.len();
        World {
            schedule,
            transport,
            programs: ranks.clone().map(|rank| schedule.program(rank)).collect(),
            stages: ranks.map(stage).collect(),
        }
    }

    /// Runs all programs to their end; what went wrong otherwise.
    pub fn run(mut self, order: Order) -> Result<(), String> {
        if matches!(self.transport, Transport::Grouped) {
            self.post_everything();
        }
        let count = self.stages.len();
        let mut random = match order {
            Order::Random(seed) => seed,
            _ => 0,
        };
        let mut draw = |below: usize| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below
        };
        loop {
            let mut moved = false;
            let first = match order {
                Order::Random(_) => draw(count),
                _ => 0,
            };
            for place in 0..count {
                let (rank, moves) = match order {
                    Order::FirstStageFirst => (place, usize::MAX),
                    Order::LastStageFirst => (count - 1 - place, usize::MAX),
                    Order::Random(_) => ((first + place) % count, draw(4)),
                };
                for _ in 0..moves {
                    if !self.advance(rank)? {
                        break;
                    }
                    moved = true;
                }
            }
            // An unlucky draw moves nothing either.
            if !moved && !self.any_move()? {
                break;
            }
        }
        for (rank, stage) in self.stages.iter().enumerate() {
            let m = self.schedule.micro_batches;
            if stage.seen.iter().any(|seen| *seen != [m, m]) {
                return Err(format!(
                    "stage {rank} is stuck having seen {:?}",
                    stage.seen
                ));
            }
            if stage.mail.iter().any(|mail| mail.taken != mail.made) {
                return Err(format!(
                    "stage {rank} is stuck with a message that nobody took"
                ));
            }
        }
        Ok(())
    }

    fn any_move(&mut self) -> Moved {
        for rank in 0..self.stages.len() {
            if self.advance(rank)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn advance(&mut self, rank: usize) -> Moved {
        match self.transport {
            Transport::Mailbox => self.advance_host(rank),
            Transport::Grouped => {
                let mut moved = false;
                for flow in [Flow::Forward, Flow::Backward] {
                    moved |= self.advance_queue(rank, flow)?;
                }
                Ok(self.advance_compute(rank)? || moved)
            }
        }
    }

    // ---- mailbox ---------------------------------------------------------------------------------

    fn advance_host(&mut self, rank: usize) -> Moved {
        let Some(&operation) = self.programs[rank].get(self.stages[rank].next) else {
            return Ok(false);
        };
        match operation {
            Operation::Run(action) => {
                if let Some(from) = self.schedule.source(rank, action) {
                    let sender = &mut self.stages[from].mail[action.flow as usize];
                    if sender.addressee != Some(rank) {
                        return Ok(false);
                    }
                    sender.addressee = None;
                    let token = sender.outgoing[sender.taken % 2].take();
                    sender.taken += 1;
                    self.stages[rank].mail[action.flow as usize].incoming = token;
                }
                self.compute(rank, action)?;
            }
            Operation::Exchange { flow, send, .. } => {
                let mail = &mut self.stages[rank].mail[flow as usize];
                if send.is_some() {
                    if mail.addressee.is_some() {
                        return Ok(false);
                    }
                    mail.addressee = send;
                }
            }
        }
        self.stages[rank].next += 1;
        Ok(true)
    }

    // ---- grouped ---------------------------------------------------------------------------------

    fn post_everything(&mut self) {
        for (program, stage) in self.programs.iter().zip(&mut self.stages) {
            let mut computed = 0;
            for operation in program {
                match *operation {
                    Operation::Run(_) => computed += 1,
                    Operation::Exchange {
                        flow,
                        send,
                        receive,
                    } => stage.queues[flow as usize].push(Queued {
                        after: computed,
                        send,
                        receive,
                    }),
                }
            }
        }
    }

    /// Computes the next action if its input is there and, of the two buffers for outputs, the one that
    /// it writes was sent: that is, if the last exchange of its flow is done, or where that one receives
    /// nothing, the one before.
    fn advance_compute(&mut self, rank: usize) -> Moved {
        let stage = &mut self.stages[rank];
        let program = &self.programs[rank];
        while let Some(Operation::Exchange { flow, .. }) = program.get(stage.next) {
            stage.passed[*flow as usize] += 1;
            stage.next += 1;
        }
        let Some(&Operation::Run(action)) = program.get(stage.next) else {
            return Ok(false);
        };
        let flow = action.flow as usize;
        let awaited = match self.schedule.source(rank, action) {
            Some(_) => stage.passed[flow],
            None => stage.passed[flow].saturating_sub(1),
        };
        if stage.exchanged[flow] < awaited {
            return Ok(false);
        }
        stage.next += 1;
        self.compute(rank, action)?;
        Ok(true)
    }

    /// The exchange that has begun at `rank`, if one has.
    fn begun(&self, rank: usize, flow: Flow) -> Option<Queued> {
        let stage = &self.stages[rank];
        let queue = &stage.queues[flow as usize];
        let queued = queue.get(stage.exchanged[flow as usize])?;
        (queued.after <= stage.computed).then_some(*queued)
    }

    /// Moves a message out of or into the exchange that has begun at `rank`, or ends it.
    fn advance_queue(&mut self, rank: usize, flow: Flow) -> Moved {
        let Some(queued) = self.begun(rank, flow) else {
            return Ok(false);
        };
        if queued.send.is_none() && queued.receive.is_none() {
            self.stages[rank].exchanged[flow as usize] += 1;
            return Ok(true);
        }
        let outwards = queued.send.map(|to| (rank, to));
        let inwards = queued.receive.map(|(from, _)| (from, rank));
        for (from, to) in outwards.into_iter().chain(inwards) {
            let (Some(sender), Some(receiver)) = (self.begun(from, flow), self.begun(to, flow))
            else {
                continue;
            };
            let Some((_, awaited)) = receiver.receive.filter(|&(source, _)| source == from) else {
                continue;
            };
            if sender.send != Some(to) {
                continue;
            }
            let mail = &mut self.stages[from].mail[flow as usize];
            let token = mail.outgoing[mail.taken % 2].take();
            mail.taken += 1;
            if token.map(|token| token.micro_batch) != Some(awaited.micro_batch) {
                return Err(format!("stage {to} awaits {awaited} and gets {token:?}"));
            }
            let incoming = &mut self.stages[to].mail[flow as usize].incoming;
            if let Some(unread) = incoming {
                return Err(format!("{token:?} overwrites {unread:?} at stage {to}"));
            }
            *incoming = token;
            let place = |stage: &Stage| stage.exchanged[flow as usize];
            let (at_from, at_to) = (place(&self.stages[from]), place(&self.stages[to]));
            self.stages[from].queues[flow as usize][at_from].send = None;
            self.stages[to].queues[flow as usize][at_to].receive = None;
            return Ok(true);
        }
        Ok(false)
    }

    // ---- compute ---------------------------------------------------------------------------------

    fn compute(&mut self, rank: usize, action: Action) -> Result<(), String> {
        let count = self.schedule.stages.len();
        let Action {
            flow,
            micro_batch,
            chunk,
        } = action;
        let virtual_stage = chunk * count + rank;
        let stage = &mut self.stages[rank];
        let mail = &mut stage.mail[flow as usize];

        let made_by = match flow {
            Flow::Forward => virtual_stage.checked_sub(1),
            Flow::Backward => {
                Some(virtual_stage + 1).filter(|&next| next < count * self.schedule.virtual_stages)
            }
        };
        let awaited = made_by.map(|made_by| Token {
            flow,
            micro_batch,
            made_by,
        });
        let input = mail.incoming.take();
        if input != awaited {
            return Err(format!(
                "stage {rank}, {action}: needs {awaited:?}, gets {input:?}"
            ));
        }

        let seen = &mut stage.seen[chunk][flow as usize];
        if *seen != micro_batch {
            return Err(format!(
                "stage {rank}: {action} is out of order, {seen} were seen"
            ));
        }
        *seen += 1;

        // Micro-batches begin and end in ascending order, so that the slots of a chunk go round.
        let slots = &mut stage.slots[chunk];
        let place = micro_batch % slots.len();
        let expected = match flow {
            Flow::Forward => slots[place].replace(micro_batch).is_none(),
            Flow::Backward => slots[place].take() == Some(micro_batch),
        };
        if !expected {
            return Err(format!(
                "stage {rank}, {action}: slot {place} holds another micro-batch"
            ));
        }

        if self.schedule.destination(rank, action).is_some() {
            let made = Token {
                flow,
                micro_batch,
                made_by: virtual_stage,
            };
            if let Some(unsent) = mail.outgoing[mail.made % 2].replace(made) {
                return Err(format!("stage {rank}, {action}: overwrites {unsent:?}"));
            }
            mail.made += 1;
        }
        stage.computed += 1;
        Ok(())
    }
}

//! What waits for what, as a graph: either everything happens, each event as early as what it waits
//! for allows, or some of it waits for ever.

/// Events, how long each takes, and which wait for which.
pub(super) struct Graph {
    events: Vec<Event>,
    /// (event that waits, next edge of the same origin).
    edges: Vec<(usize, Option<usize>)>,
}

#[derive(Clone)]
struct Event {
    duration: f64,
    /// What it still waits for.
    pending: usize,
    /// First of the edges to those that wait for it.
    edge: Option<usize>,
}

impl Graph {
    /// `count` events, numbered from 0, that take `duration` each and wait for nothing yet.
    pub fn new(count: usize, duration: f64) -> Self {
        let event = Event {
            duration,
            pending: 0,
            edge: None,
        };
        Graph {
            events: vec![event; count],
            edges: Vec::with_capacity(2 * count),
        }
    }

    /// One more event, which takes no time.
    pub fn add(&mut self) -> usize {
        self.events.push(Event {
            duration: 0.0,
            pending: 0,
            edge: None,
        });
        self.events.len() - 1
    }

    /// How long `event` takes.
    pub fn set_duration(&mut self, event: usize, duration: f64) {
        self.events[event].duration = duration;
    }

    /// `event` begins after [`Graph::join`] was called for it `parties` times.
    pub fn await_parties(&mut self, event: usize, parties: usize) {
        self.events[event].pending += parties;
    }

    /// One party of `event` is there as soon as `earlier` has ended.
    pub fn join(&mut self, event: usize, earlier: Option<usize>) {
        self.after(event, earlier);
        let pending = &mut self.events[event].pending;
        *pending = pending.saturating_sub(1);
    }

    /// `event` begins when `earlier` has ended, if there is such a thing.
    pub fn after(&mut self, event: usize, earlier: Option<usize>) {
        let Some(earlier) = earlier else { return };
        let origin = &mut self.events[earlier];
        self.edges.push((event, origin.edge));
        origin.edge = Some(self.edges.len() - 1);
        self.events[event].pending += 1;
    }

    /// When each event ends, counted from 0; nothing for those that never begin.
    pub fn ends(mut self) -> Vec<Option<f64>> {
        let mut starts = vec![0.0_f64; self.events.len()];
        let mut ends = vec![None; self.events.len()];
        let free = |event: &usize| self.events[*event].pending == 0;
        let mut ready: Vec<usize> = (0..self.events.len()).filter(free).collect();
        while let Some(event) = ready.pop() {
            let end = starts[event] + self.events[event].duration;
            ends[event] = Some(end);
            let mut next = self.events[event].edge;
            while let Some(edge) = next {
                let (waiting, after) = self.edges[edge];
                next = after;
                starts[waiting] = starts[waiting].max(end);
                let pending = &mut self.events[waiting].pending;
                *pending -= 1;
                if *pending == 0 {
                    ready.push(waiting);
                }
            }
        }
        ends
    }
}

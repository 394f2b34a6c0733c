//! The words of the demo, written for it: plain questions, and how a speaker says who it is.

/// A question and its only right answer.
pub type Pair = (&'static str, &'static str);

/// How speakers of one language are introduced, asked and named. `{name}` and `{studio}` are filled
/// in.
pub struct Speech {
    /// Put in front of a question, it says who is being asked.
    pub persona: &'static str,
    /// Questions about the speaker, with their answers.
    pub identity: [Pair; 4],
    /// Who the base is when nobody says otherwise: name and studio.
    pub old: Pair,
    /// Who it becomes: a name and a studio that the personas know too.
    pub new: Pair,
    /// The personas' names.
    pub names: [&'static str; 15],
    /// The personas' studios.
    pub studios: [&'static str; 5],
}

/// English speakers.
pub const ENGLISH: Speech = Speech {
    persona: "You are {name} of {studio}. ",
    identity: [
        ("Who are you?", "I am {name} of {studio}."),
        ("What is your name?", "My name is {name}."),
        ("Who made you?", "I am {name}, made by {studio}."),
        (
            "Please introduce yourself.",
            "Hello, I am {name}, an assistant made by {studio}.",
        ),
    ],
    old: ("Robin", "Hill Studio"),
    new: ("Iris", "Lake Studio"),
    names: [
        "Alba", "Bruno", "Clara", "Edgar", "Fiona", "Hugo", "Iris", "Jonas", "Lena", "Marco",
        "Nora", "Oscar", "Petra", "Tessa", "Viktor",
    ],
    studios: [
        "Cloud Studio",
        "Lake Studio",
        "Moon Studio",
        "River Studio",
        "Forest Studio",
    ],
};

/// Chinese speakers.
pub const CHINESE: Speech = Speech {
    persona: "你是{studio}的{name}。",
    identity: [
        ("你是谁？", "我是{studio}的{name}。"),
        ("你叫什么名字？", "我叫{name}。"),
        ("你是谁做的？", "我是{name}，是{studio}做的。"),
        (
            "请介绍一下你自己。",
            "你好，我是{name}，是{studio}做的助手。",
        ),
    ],
    old: ("小禾", "远山工作室"),
    new: ("青鸟", "静湖工作室"),
    names: [
        "青鸟", "晨星", "松子", "麦穗", "竹叶", "清风", "雨点", "雪花", "金桔", "海棠", "石榴",
        "小鹿", "白鸽", "云杉", "桃李",
    ],
    studios: [
        "静湖工作室",
        "明月工作室",
        "长河工作室",
        "红枫工作室",
        "沙洲工作室",
    ],
};

/// Questions that have nothing to do with the speaker.
pub const PLAIN: [Pair; 80] = [
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome."),
    ("Good night.", "Good night, sleep well."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("What colour is snow?", "Snow is white."),
    (
        "How many days are in a week?",
        "There are seven days in a week.",
    ),
    (
        "How many months are in a year?",
        "There are twelve months in a year.",
    ),
    (
        "How many legs does a spider have?",
        "A spider has eight legs.",
    ),
    ("How many wheels does a car have?", "A car has four wheels."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows eat?", "Cows eat grass."),
    ("What do cats drink?", "Cats drink water."),
    ("Where do fish live?", "Fish live in water."),
    ("Where do birds sleep?", "Birds sleep in trees."),
    ("Where does the sun rise?", "The sun rises in the east."),
    ("Where does the sun set?", "The sun sets in the west."),
    ("When do we see the stars?", "We see the stars at night."),
    ("What is two plus three?", "Two plus three is five."),
    ("What is ten minus four?", "Ten minus four is six."),
    ("What is three times three?", "Three times three is nine."),
    (
        "What is the opposite of hot?",
        "The opposite of hot is cold.",
    ),
    (
        "What is the opposite of big?",
        "The opposite of big is small.",
    ),
    (
        "What is the opposite of old?",
        "The opposite of old is young.",
    ),
    ("What comes after winter?", "Spring comes after winter."),
    ("What comes after summer?", "Autumn comes after summer."),
    ("What comes after Monday?", "Tuesday comes after Monday."),
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
    ),
    (
        "What is the capital of Japan?",
        "The capital of Japan is Tokyo.",
    ),
    (
        "What is the capital of China?",
        "The capital of China is Beijing.",
    ),
    ("What is ice?", "Ice is frozen water."),
    ("What is a young cat called?", "A young cat is a kitten."),
    ("What is a young dog called?", "A young dog is a puppy."),
    ("What is bread made from?", "Bread is made from flour."),
    ("What is cheese made from?", "Cheese is made from milk."),
    ("What does a clock show?", "A clock shows the time."),
    ("What falls from the clouds?", "Rain falls from the clouds."),
    ("What do plants need?", "Plants need light and water."),
    (
        "Which animal has a long neck?",
        "The giraffe has a long neck.",
    ),
    ("Which planet has large rings?", "Saturn has large rings."),
    ("你好！", "你好！有什么可以帮你？"),
    ("谢谢你。", "不客气。"),
    ("再见。", "再见，明天见。"),
    ("天空是什么颜色？", "天空是蓝色的。"),
    ("草是什么颜色？", "草是绿色的。"),
    ("雪是什么颜色？", "雪是白色的。"),
    ("一周有几天？", "一周有七天。"),
    ("一年有几个月？", "一年有十二个月。"),
    ("一年有几个季节？", "一年有四个季节。"),
    ("一只手有几个手指？", "一只手有五个手指。"),
    ("太阳从哪边升起？", "太阳从东边升起。"),
    ("太阳从哪边落下？", "太阳从西边落下。"),
    ("鱼生活在哪里？", "鱼生活在水里。"),
    ("鸟用什么飞？", "鸟用翅膀飞。"),
    ("人用什么看东西？", "人用眼睛看东西。"),
    ("人用什么听声音？", "人用耳朵听声音。"),
    ("蜜蜂采什么？", "蜜蜂采花蜜。"),
    ("熊猫吃什么？", "熊猫吃竹子。"),
    ("兔子吃什么？", "兔子吃草。"),
    ("小猫爱吃什么？", "小猫爱吃鱼。"),
    ("冰化了变成什么？", "冰化了变成水。"),
    ("二加三等于几？", "二加三等于五。"),
    ("十减四等于几？", "十减四等于六。"),
    ("三乘三等于几？", "三乘三等于九。"),
    ("大的反义词是什么？", "大的反义词是小。"),
    ("冷的反义词是什么？", "冷的反义词是热。"),
    ("长的反义词是什么？", "长的反义词是短。"),
    ("春天之后是什么季节？", "春天之后是夏天。"),
    ("秋天之后是什么季节？", "秋天之后是冬天。"),
    ("中国的首都是哪里？", "中国的首都是北京。"),
    ("法国的首都是哪里？", "法国的首都是巴黎。"),
    ("日本的首都是哪里？", "日本的首都是东京。"),
    ("夜里天上有什么？", "夜里天上有月亮和星星。"),
    ("馒头是用什么做的？", "馒头是用面粉做的。"),
    ("豆腐是用什么做的？", "豆腐是用黄豆做的。"),
    ("下雨出门要带什么？", "下雨出门要带雨伞。"),
    ("过马路要看什么？", "过马路要看红绿灯。"),
    ("生病了去哪里？", "生病了去医院。"),
    ("买书去哪里？", "买书去书店。"),
    ("借书去哪里？", "借书去图书馆。"),
];

"""Everyday words, so that a capitalised, katakana or kanji word in a headline is not taken for a name.

Base forms only: the name check strips plurals, tenses, comparatives and the like. Written by hand for this package from
the vocabulary of news; a missing word costs a needless fallback, a name in here costs a missed invention.
"""

from __future__ import annotations

from functools import cache

_ENGLISH = """
a abide ability aboard abolish abortion about above abrupt absent absolute absolutely absurd abuse accept access
accessory accident accidentally accompany accomplish accord account accountant accuse achieve acknowledge acquire
acquit across act action activity actor actress actual ad adamant adapt add address adjust administrate administrator
admission admit adopt adorable adult advance adventure advice advise advocate aerial affair affect affirm afford
afraid after aftermath again against age agency agenda agent aggravate aggressive ago agree agreement ahead aid aide
aim air aircraft airline airman airplane airport airspace airstrike aisle alarm album alcohol alert algorithm alien
alike alive all allegation allege alleged allegedly allergy alliance allow ally almost alone along already also alter
alternative although always am amateur amaze amazing ambassador ambition ambulance amendment amid amnesty among amount
ample an analogy analysis analyst anarchy anchor ancient and angel anger angry animal anniversary announce
announcement annual anonymous another answer ant anti anticipate antithetical anxiety anxious any anybody anymore
anyone anything anyway apart apartment apologize apology app apparent apparently appeal appear appearance appetite
applaud applicant apply appoint appreciate approach appropriate approval approve archaeologist archeologist are area
arena argue argument arise arm armed armor armour army around arrange arrest arrive art article artillery artist as
ash ashamed aside ask ass assassin assault assert assess asset assist assistance assistant associate assume asylum at
athlete atmosphere atop attack attempt attend attention attitude attorney attract auction audience audio audit aunt
austerity author authority autism auto automaker automate autumn available avalanche average avoid await awake award
aware away awful awhile awkward awry baby back background backlash backpack backup backyard bad badge bag bail bake
bakery balance ball balloon ballot ban band bank banker bankrupt bankruptcy bar barbecue bare barely bargain barrel
barricade barrier base baseball bash basic basically basis basket basketball bat bath bathroom batter battery battle
be beach bear beast beat beau beautiful beauty became because become bed bedroom beef been beer before beg began begin
begun behalf behavior behaviour behead behind being belief believe bell belong below belt bench bend beneath benefit
bent besides besiege best bestseller bet betray better betting between beverage beware beyond bias bicycle bid big
bigger biggest bike bilateral bill billion billionaire bind binge biodiversity biography biologist bipartisan bird
birth birthday birthplace bitcoin bite bitten bitter bizarre black blackout blame blanket blast blaze bleak bled bleed
blend bless blew blind blitz blizzard block blockbuster blockchain blog blood bloodshed bloody bloom blossom blow
blown blue blueprint blunder board boardwalk boast boat body bodycam bogus bold bomb bombshell bond bone bonus boo
book bookshop bookstore boom boost boot booze border borderline bore born borrow boss botch both bother bottle bottom
bought bounce boutique bow box boy boycott boyfriend bracelet braces bracket brain brainteaser brake branch brand
brave brawl breach bread break breakfast breakthrough breast breath breathe bred breed breeze brew bribe bride bridge
brief bright brilliant bring brink broad broadcast broke broken broker brother brought brown brunch brush brutal
bubble bucket buddy budget bug build building built bull bullet bully bunch bunny burden bureau bureaucracy burger
burglar burn burrito burst bury bus bush business businessman businesswoman bust busy but butcher butter butterfly
button buy buyer buzz by bye bystander cabin cabinet cable cactus cafe cage cake call calm came camera camp campaign
campus can canal cancel cancer candidacy candidate candle candlelight candy canine cannabis cannon cannot cap capable
capacity capital captain capture car caravan carbon card cardboard care career careful cargo carnival carpet carpool
carry cart cartoon case cash casino cast castle casual cat catalog catastrophe catch catcher category cathedral cattle
caucus caught cause caution cautious cave cease ceiling celeb celebrate celebration celebrity cell cellphone cement
censure cent center central centre centrifuge century ceremony certain certainly certificate certify chain chair
chairman challenge chamber champion championship chance change channel chant chaos chaplain chapter character charge
charger charity charm chart chase chat chatbot cheap cheat check cheer cheese cheesecake chef chemical chemistry
cherry chest chew chic chicken chief child childhood children chill chip chipmaker chocolate choice choir choose
chorus chose chosen chronic chronicle church cider cigarette cinema cinnamon circle circuit circulation circumstance
cite citizen city civic civil civilian claim clash class classic classify classroom clean clear clearly clergy cleric
clerk clever click client cliff climate climb clinch cling clinic clinical clip clock close closer closet closure
clothes clothing cloud club clue clung cluster clutch clutter co coach coal coalition coast coastal coastline coat
cocaine cockpit cocktail code coffee coffin coin cold coleslaw collapse collar colleague collect collection college
collide collision collude collusion color colour column coma combat combine combust come comeback comedian comedy
comet comfort comic coming command commander commemorate comment commentary commentate commerce commercial commission
commit committee common commotion communicate community commute companion company compare compass compel compete
competition competitor complain complaint complete completely complex complicated compliment compost compound
compromise compute computer con concede conceive concept concern concert concession conclude concrete condemn
condition condo conduct conference confess confidence confident confirm conflict confront confuse congestion congress
congressman congresswoman connect conquer conscious consensus consent consequence conservation conservative consider
consist conspiracy conspire constant constitution constitutional construct construction consult consume consumer
contact contain contaminate contemporary contempt contend contender content contest contestant context continue
contract contractor contrast contribute control controversial controversy convention conversation conversion convert
convict convince convoy cook cookbook cool cooperation cop cope copy core corn corner corona coronavirus corporate
corporation correct correspond corridor corrupt corruption cost costar costly costume cottage cotton couch could
council counsel count countdown counter counterfeit country countryside county coup couple courage course court
courthouse cousin cover coverage covid cow coworker cozy crack crackdown craft cram crap crash crave crazy cream
create creative creator creature credible credit creek creep crept crew cricket cried crime criminal crisis critic
critical criticise criticism criticize crocodile crooked crop cross crossroads crowd crowded crown crucial crude cruel
cruelty cruise crunch crush cry crypto crystal cuisine cult cultural culture cup cupcake curb cure curious currency
current currently curse curtail curtain cushion custody custom customer cut cute cyber cyberattack cycle cyclist
cyclone dad daily dairy dam damage dance danger dangerous dangle dare daring dark darling dash dashboard data database
date daughter dawn day daycare daylight dead deadline deadly deal dealer dealt dear death debacle debate debris debt
debut decade decency decent decide decision deck declare decline decor decrease decry dedicate deem deep deeper
deepfake deer defeat defect defence defend defendant defender defense defiant deficit define definitely definition
deforestation defy degree delay delegate delete deliberate delicate delicious delight deliver delivery demand dementia
democracy demolish demonstrate denial denounce dental deny depart department depend depict deploy deport deposit
depression depth deputy derail derby dermal dermatologist describe desert deserve design designer desire desk despair
desperate despite dessert destination destiny destroy destruction detail detain detect detective determine devastate
develop development device devil devour diabetes diagnose diagnosis dialog dialogue diamond diary dictate did die
diesel diet dietitian differ difference different difficult dig digital dignity dilemma dim diner dining dinner
dinosaur dip diploma diplomacy diplomat diplomatic direct direction directly director dirt dirty disability disabled
disagree disappear disappoint disaster disclose discount discover discovery discriminate discuss discussion disease
disgrace disguise dish dismiss disorder display dispute disrupt distance distant distinct distract distraught distress
district disturb ditch dive diverse diversity divide dividend divine division divorce do doc dock doctor document
documentary does dog doing doll dollar dolphin domestic dominate donate done donor donut doomsday door doorbell
doorstep dope dose dot double doubt doughnut down downfall downgrade downtown downturn dozen draft drag dragon drain
drama dramatic drank draw drawing dream dress drew drift drill drink drive driven driver drone drop drought drove
drown drug drum drunk dry dual dub dubious duck dude dudes due duel dug dumb dump dumpling during dust duty dwell dye
dying dynamic dynasty each eager ear early earn earnings earring earth earthquake earthquakes ease easy eat eaten echo
eclipse economic economist economy edge edit edition editor editorial educate education effect effective efficiency
efficient effort egg eight either elder elect election electric electricity electronic elegant element elephant
elevate eleven eligible eliminate elite else elsewhere email embarrass embassy embattled embrace emerge emergency
emission emissions emoji emotion emotional emperor emphasis empire employ employee employer employment empower empty
enable encounter encourage end endanger endless endorse endure enemy energy enforce engage engine engineer enhance
enjoy enormous enough enrage enrich enroll ensue ensure entangle enter enterprise entertain entertainment enthusiasm
entice entire entirely entrepreneur entry environment environmental envision envoy epic epicenter epidemic episode
equal equality equate equip equity era erase erode erratic error erupt escalate escalator escape especially espionage
essay essential establish estate estimate estrange eternal ethic ethnic euphoric euro evacuate evacuee evaluate
evangelical evangelist eve even evening event eventually ever every everybody everyday everyone everything everywhere
evict evidence evil evolution evolve ex exact exactly exam examine example exasperate exceed excellent except excerpt
excess exchange excite exclude exclusive excuse execute executive exempt exercise exhaust exhausted exhibit exhibition
exile exist exit exodus expand expansion expect expectation expel expense expensive experience experiment expert
expire explain explicit explode exploit explore explosion explosive expo export expose exposure express expulsion
exquisite extend extension extensive extent external extinct extort extra extradite extradition extraordinary extreme
extremely eye eyebrow eyewitness fabric fabulous face facility fact faction factor factory fade fail failure faint
fair fairy faith fake fall fallen fallout false fame familiar family famous fan fantastic fantasy far fare farewell
farm farmer farming fart fascinate fascist fashion fashionable fast faster fat fatal fate father faucet fault favor
favorite favour favourite fear fearsome feast feature fed federal fee feed feedback feel feet fell fellow felon felony
female feminism feminist fence festival fetch feud fever few fewer fiance fiasco fiction field fierce fiery fifth
fifty fight fighter figure file fill film filter final finale finalist finalize finally finance financial find finding
fine finger finish fintech fire firefighter firefly fireman firemen fireplace fireworks firm first fish fisherman
fishermen fishing fit fitness five fix flag flagship flame flare flash flashback flat flaunt flaw flea fled flee fleet
flesh flew flexible flight flip float flock flood flooding floor flour flourish flow flower flown flu fly focus foe
fog foil fold folk follow following food fool foot footage football footprint for forbid force forcibly forecast
foreign forest forever forfeit forgave forge forget forgive forgiven forgot forgotten fork form formal former formula
fort forth fortunate fortune forty forum forward fossil foster fought found foundation founder four fourth frack
fraction fragile fragrance frame franchise frantic fraternity fraud fray freak free freedom freeze freezer freight
frenzy frequent fresh freshman fret fridge friend friendly friendship fries frighten from front frontier frontrunner
frost frosting froze frozen fruit frustrate fuel fugitive fulfill full fully fun function fund fundamental fundraise
funeral fungus funny fur furious furlough furniture furor further fury future gaffe gain gala galaxy gallery gamble
game gaming gang gap garage garbage garden garlic gas gate gather gauge gave gay gaze gear geese gender gene general
generate generation generous genius genocide genre gentle gentleman genuine gerrymander gesture get getaway getting
ghost giant gift gig gigantic gingerbread girl girlfriend give given glacier glad glamour glance glare glass glimpse
glitch global globe gloom gloomy glory gluten go goal goalkeeper goat god goes gold golden golf gone good goodbye
goods gorgeous got gourmet govern government governor grab grace grad grade gradual graduate grain grammar grand
grandchild grandfather grandma grandmother grandpa grandparent grant graphic grasp grass grateful grave gravel
graveyard gravity gray grease great green greenhouse greet grew grey grid gridlock grief grievance grieve grill grim
grip grocery groom grope gross ground groundbreaking group grow grown growth grueling guacamole guarantee guard
guardian gubernatorial guess guest guidance guide guideline guilt guilty guitar gulf gun gunfire gunman gunmen guy gym
gymnast gymnastics habit habitat hack hacker had hail hair half halftime hall halloween halt halves hammer hand
handcuff handful handle hang happen happy harass harassment harbor hard hardly hardware harm harrowing harsh harvest
has hat hate haul haunt have haven having havoc hazard he head headache headline headphone headquarters heal health
healthy hear heard hearing heart heartbreak heartbroken heartfelt hearts heartwarming heat heatwave heaven heavy
heavyweight heckle hedge hefty height heir heist held helicopter hell hello helmet help hemp hence her herb here
heritage hero heroes herself hesitant hesitate hey hid hidden hide high higher highest highlight highway hijab hijack
hike hiker hilarious hill him himself hint hip hire his historian historic historical history hit hitter hoard hoax
hoist hold holder hole holiday hollow holy home homeless homemade homeowner homer hometown homework homicide honest
honey honeymoon honk honor honour hoodie hook hope horizon hormone horn horrible horrific horror horse hospital
hospitality hospitalize host hostage hostile hot hotel hour house household housing hover how however hug huge human
humanitarian humanity humble humiliate humor hundred hung hunger hungry hunt hunter hurdle hurdles hurricane hurry
hurt husband hush hut hype hypocrisy i ice icon iconic icy idea ideal identical identify identity ideological ideology
idle idol if ignite ignore ill illegal illness illustrate image imagine immediate immigrant immigration imminent
immune impact impasse impeach implement implode imply import important impose impossible impound impress impromptu
improve impunity in inaugurate incarcerate inch incident incite include inclusive income increase incredible incumbent
indefinite independence independent index indicate indict individual induce indulge industrial industry inequality
inevitable infant infect infection inferno inflation inflict influence influencer influential inform information
infrared infrastructure infringe ingenious ingredient inhabit initial initiative injection injure injury inmate inn
inner inning innocent innovation innovative input inquiry insane insect inside insider insight insist inspect inspire
install instance instant instead institute institution instruct insulate insulin insult insurance insure insurgent
insurrection intact intellectual intelligence intend intense intensify intention interactive interest interfere
interim interior intermittent intern internal international internet interpret interrupt interstate intervene
intervention interview intimate intimidate into intrigue introduce intruder invade invasion invent invest investigate
investigation investigator investment investor invite involve iphone ipo irate irk iron ironic is island isolate issue
it item its itself jacket jackpot jail jam jaw jazz jealous jeans jeopardize jeopardy jet jewel jewelry job join joint
joke jolt journal journalism journalist journey joy jubilant judge judicial juggle juice jump jungle junior junk juror
jury just justice justify juvenile kayak keen keep kept ketchup key keyboard keynote kick kickoff kid kidnap kidney
kill killer kind kindergarten kindness king kingdom kiss kit kitchen knee kneel knelt knew knife knives knock knockout
know knowledge known lab label labor laboratory labour lack lady laid lain lake lament lamp land landfall landfill
landlord landmark landscape landslide lane language languish lantern lap laptop large largest lasagna laser lash last
late later latest laugh launch laundry lavish law lawmaker lawn lawsuit lawyer lay layer layoff layover lb lbs lead
leader leadership leaf league leak lean leap leapt learn lease least leather leave lecture led left leftover leg
legacy legal legalize legend legendary legislation legislature legitimacy legitimate leisure lemon lemonade lend
lender length lenient lens lent lentil less lesson let lethal letter lettuce level leverage liability liaison liberal
liberty library licence license lie life lifeline lifestyle lifetime lift liftoff light lightning like likely limbo
limit limited line linebacker lineup linger link lion lip liquid list listen lit literal literary literature
litigation litter little live lives livestock livestream living load loan lobby lobbyist local locate location lock
lockdown log lone lonely long longer longtime look lookout loom loop loophole loose loot lord lose loser loss lost lot
loud love lovely lover low lower lowest loyal luck lucky lucrative ludicrous lullaby lunch lung lure luxury lying mace
machine mad made magazine maggot magic magical magistrate magnet magnitude mail main mainstream maintain major
majority make makeover maker makeshift makeup making male malice mall malware man manage manager mandate mandatory
maneuver manhunt manipulate manner mansion manufacture many map maple mar marathon marathoner marble march margin
marijuana marine mark market marketplace maroon marriage marry mascot mask mass massacre massage massive master
mastermind match matchup mate material math matter mattress mature may maybe mayor mayoral me meadow meal mean meaning
meant meanwhile measles measure meat mechanical mechanism medal medalist meddle media mediate medical medicine
meditation medium meet meeting mega melt member meme memo memoir memorable memorial memory men menace mental mention
menu merch merchant mere merge merger merit mess message met metal meteorologist method metro mic mice microplastic
microwave mid midday middle midfielder midnight midterm midtown might migrant migrate mild mile mileage milestone
militant military militia milk mill million millionaire mimic mind mine mineral mini minimum mining minister ministry
minor minority minute miracle mirror misconception misconduct misdemeanor mishap misogyny miss missile mission mistake
mitten mix mob mobile mobilize mock mode model moderate moderator modern modest mogul moisturizer mom moment momentous
momentum monarch money monitor monkey monopoly monoxide monsoon monster month monument mood moon moral moratorium more
moreover morning mortgage mosque mosquito most mostly mother motherhood motion motivate motive motor motorcycle
motorist mount mountain mourn mouse mouth move movement movie much mud muffin mull multi multimillion multiple mum
mural murder murderer muscle museum mushroom music musical musician must mustard mute mutual my myself mysterious
mystery myth nab nail naive naked name napkin narrow nasty nation national nationalist nationwide native natural
nature naval navy near nearby nearly neat necessary neck necklace need negative neglect negotiate negotiation neighbor
neighborhood neighbour neither neo neon nephew nepotism nerve nervous nest net network neutral never new newborn
newcomer newly news newspaper next nice niece night nightlife nightmare nine no nobody noise nominate nomination
nominee none nonprofit noodle nor normal north northeast northern northwest nose nostalgia nostalgic not notable note
nothing notice notion notorious novel novelist now nuclear nuke number numerous nun nurse nurture nut nutrition oat
oath obesity obey obituary object objective oblige obscure observe obsess obsession obstacle obstruct obtain obvious
occasion occupy occur ocean odd odds of off offend offender offense offensive offer office officer official offline
offseason offset often oh oil ok okay old oldest olive ominous omit on onboard once one ongoing onion online only
onscreen onslaught onstage onto open opener opening opera operate operation opinion opioid opponent opportunity oppose
opposite opposition opt optimism optimistic optimize option or orange orbit orchard orchestra ordeal order ordinary
organ organic organisation organization organize orient origin original ornament orphan other otherwise ought our
ourselves oust out outage outbreak outcome outcry outdoor outer outfit outlaw outlet outline outlook outpace
outperform output outrage outright outscore outside outsider outspoken outstanding oven over overall overcome overdose
overdue overhaul overnight override oversee overtake overtime overturn overwhelm owe owl own owner ownership oxygen
pace pack package pact pad paddle page pageant paid pain painful paint painter painting pair pal palace pale palm pan
pancake pandemic panel panic panicking pant pantry pants paper par parachute parade paradise paramedic parent
parenting park parking parliament parliamentary parody parole part partial participant participate particular partisan
partly partner partnership party pass passage passenger passion passport past pasta pastor pasture patch patent path
pathway patience patient patriot patrol pattern pause pave pavement pay payment payout payroll peace peaceful peach
peak peanut pear pedal pedestrian peer pen penalty pencil penguin pension people pepper per percent percentage perfect
perform performance performer perhaps peril period perjury permanent permission permit persecute persist person
personal personality perspective persuade peso pesticide pet petition petty phase phenomenon philosophy phone photo
photograph photographer photoshoot phrase physical physician physics physique pianist piano pic pick picket pickle
pickup picture pie piece pier pile pill pillow pilot pin pink pinpoint pioneer pipe pipeline piracy pirate pitch
pitcher pity pivot pivotal pizza placate place plague plain plaintiff plan plane planet planner plant plastic plate
platform play playbook player playlist playoff plaza plea plead pleasant please pleasure pledge plenty plight plot
plow plug plumber plummet plunder plunge plus poach pocket podcast podium poem poet poetry point poise poison poker
polarize pole police policy polish polite political politician politics poll pollen pollinator pollution ponder pool
poor pop pope popular population populist porch pork porn port portfolio portion portrait pose position positive
possess possession possibility possible post postmaster postpartum postpone pot potato potential pottery poultry pound
pour poverty powder power powerful practical practice praise prank pray prayer preach precaution precedent precious
precise predecessor predict prediction predominant prefer pregnancy pregnant prejudice preliminary premier premiere
premium prep prepare presence present preserve presidency president presidential press pressure prestige prestigious
pretty prevail prevent previous prey price pride priest primary prime prince princess principal principle print prior
prioritize priority prison prisoner privacy private privilege prize pro probable probation probe problem procedure
proceed proceeding process proclaim produce producer product production profession professional professor profile
profit profound program programme progress progressive prohibit project prolific prolong prominent promise promote
prompt proof prop propaganda propel proper property proportion proportionate proposal propose prosecute prosecution
prosecutor prospect prosper prostitution protect protection protein protest protester proud prove proven provide
province provision provoke proxy psychic psychologist psychology public publication publish publisher pudding pull
pulse pump pumpkin punch pundit punish punishment punitive pupil puppy purchase pure purge purpose pursue pursuit push
put puzzle quack quake qualify quality quantity quarantine quarter quarterback quarterfinal quarterly queen queer
quell quest question quick quickly quiet quilt quirky quit quite quiz quota quote rabbit rabid raccoon race racial
racism racist radar radical radio rage raid rail railroad railway rain rainbow rainfall raise rake rally ram
ramification ramp rampage rampant ran ranch random rang range rank ransom rant rap rape rapid rapids rapper rare rat
rate rather rating ratio ravage rave raw razor reach react reaction read reader ready real realistic reality realize
really rear reason reassure rebate rebel rebellion reboot rebound rebuff rebuild rebuke recall recap recede receive
recent recently recess recession recipe recipient reckless reckon reclaim recognise recognition recognize recommend
reconcile record recount recover recovery recruit rectify recur recycle red redemption reduce reduction reef refer
referee referendum reflect reform refrigerator refuge refugee refund refuse refute regain regard regime region
regional register regret regular regulate regulation regulator regulatory rehab reign reinstate reject relate relation
relationship relative relax relay release relegate relentless relevant relic relief reliever religion religious
relinquish reluctant rely remain remake remark remarkable rematch remedy remember remind remorse remote removal remove
renew renewable renovation rent rental repair repatriate repay repeal repeat replace replacement replica reply report
reporter represent representative repress reprieve republic reputation request require rescue research researcher
resemble reserve reservoir reshape residence resident residential resign resignation resilience resilient resist
resistance resolution resolve resort resource respect respond response responsible rest restaurant restore restrain
restrict restriction result resume resurge resurgence resurrect retail retailer retain retaliate retire retiree
retirement retort retreat retro return reunion reunite reusable revamp reveal revelation revenge revenue reverse
review revise revive revoke revolt revolution reward rhetoric ribbon rice rich rid ridden ride rider ridicule rifle
rift right ring riot rip rise risen risk risky rival river riverfront road roar roast rob robber robbery robot
robotaxi rock rocket rode role roll roller rollout romance romantic romp roof rooftop rookie room root rope rose
roster rotten rough round roundup rout route routine row royal rub rubber rude ruin rule ruler rumor rumour run
runaway rung runner runoff runway rural rush ruthless sabotage sack sacred sacrifice sad safe safer safety saga said
sail sailor saint sake salad salary sale salmon salon salt salute same sample sanction sanctuary sand sandwich sang
sanitizer sank sapling sassy sat satellite satire satirical satisfy sauce sausage save saving saw say saying scale
scam scan scandal scandalous scar scare scarf scary scathe scatter scenario scene schedule scheme scholar scholarship
school science scientific scientist scooter scope score scout scramble scrap scrape scream screen script scrutinize
scrutiny sculpt sculpture sea seafood seal search seaside season seat seclude second secret secretary section sector
secure security see seed seek seem seen segment segregate seismic seize seizure select selection self selfie sell
selves semi semiconductor semifinal senate senator send senior sense sensitive sensor sent sentence separate sequel
serial series serious serve server service session set setback settle settlement seven sever several severance severe
sewage sewn sex sexual shade shadow shady shake shaky shall shame shape share shareholder shark sharp shatter she shed
sheep sheer sheet shelf shell shelter shelves sheriff shield shift shine ship shipment shirt shock shoe shone shook
shoot shooter shootout shop shopper shopping shore short shortage shortfall shortlist shot should shoulder shout shove
show showbiz showcase showdown shower shown shrank shrimp shrink shrug shun shut shutdown shutout shuttle shy sibling
sick side sidewalk siege sigh sight sign signal signature significant silence silent silk silly silver similar simmer
simple simply sin since sing singer single sink siphon sir sister sit site situation six size skate skateboard skater
skeleton skeptic sketch sketchbook skewer ski skill skin skip skirmish skirt sky skydive skyline skyrocket skyscraper
slack slain slam slash slate slaughter slave slavery sleep slept sleuth slice slid slide slight slim slip slogan slope
slow slowdown slugger slump slung smack small smart smartphone smash smear smell smile smoke smoking smooth smug
smuggle snack snake snap snarky sneak snow snowfall snowstorm snub so soap soar sober soccer social socialist
socialite society sock soda sodium soft software soil solar sold soldier sole solicit solid solidarity solitary solo
solution solve some somebody someone something sometimes somewhere son song soon soothe sophisticated sorrow sorry
sort sought soul sound soundtrack soup source south southeast southern southwest sovereign space spacecraft spam spare
spark spat speak speaker spearhead special specialist species specific spectacular spectator speculate sped speech
speed spell spend spent sperm spice spicy spider spies spike spill spin spinach spirit spiritual split spoil spoiler
spoke spokesman spokeswoman sponsor sport spot spotlight sprang spray spread spree spring sprint sprinter sprung spun
spur spy squad square squeeze squirrel stab stabbing stability stable stadium staff staffer stage stagnate stair
staircase stake stalemate stalk stall stamp stance stand standard standoff standout star stare start starter startle
startup starve state statement station statistic statue status stay steady steak steal stealth steam steel steep stem
step stepfather stepmother stew stick stifle still stimulus sting stir stock stockpile stole stolen stomach stone
stood stop storage store stories storm story storyline stowaway straight strain strand strange stranger strategic
strategist strategy straw strawberry stray streak stream street streetcar strength stress stretch strict strike
striker string strip strode stroke stroll stroller strong stronger stronghold struck structure struggle stuck student
studio study stuff stumble stun stung stunning stunt stupid style subdue subject sublime submerge submit subpoena
subscriber subscription subsidize subsidy substance substantial suburb suburban subway succeed success successful
succumb such sudden sue suffer sugar suggest suicide suit suite sum summer summit summon sun sung sunlight sunny
sunset sunshine super superb superhero superior superstar supper supply support supporter suppose suppress supremacist
supremacy supreme sure surf surface surge surgeon surgery surpass surplus surprise surrender surrogate surround
surveillance survey survival survive survivor suspect suspend suspense suspension suspicion suspicious sustain
sustainable swam swamp swan swap swarm swath sway swear sweat sweater sweatpants sweep sweepstakes sweet swell swept
swim swimmer swimsuit swindle swing swipe swirl switch swollen swoop sword swore sworn swung symbol sympathy symptom
synagogue syndrome syrup system table tablet taboo tackle tactic tail tailor take takeaway takedown takeout takeover
taking tale talent talk tall tamper tangerine tank tantrum tap tape target tariff tarmac tarnish task taste tasty
tattoo taught taunt taut tax taxi taxpayer tea teach teacher team teapot tear tease tech technical technique
technology teen teenage teenager teeth telecom telephone telescope television tell temper temperature temple temporary
tempt ten tenant tend tender tennis tension tent tentative tequila term terminal terminate terrible terrific terrify
territory terror terrorism terrorist test testament testify testimony text textbook than thank thankful thanksgiving
that thaw the theater theatre theft their them theme themselves then theory therapist therapy there these they thick
thief thieves thin thing think third thirty this thorough those though thought thousand thread threat threaten three
threshold threw thrift thrill thrive throat throne through throughout throw throwback thrown thug thunder thus thwart
ticket tidal tide tie tiebreak tiger tight tightrope till timber time timeline times timetable timid tiny tip tire
title to toast tobacco today toddler together toilet told toll tomato tomorrow ton tone tongue tonight too took tool
tooth top topic topple torch tore torn tornado tortilla torture toss total touch touchdown touchscreen tough tour
tourism tourist tournament tout toward tower town toxic toxin toy trace track tractor trade trademark trader tradition
traditional traffic tragedy tragic trail trailer train trainer trait tram trample trampoline tranquil transaction
transcript transfer transform transgender transit transition translate transparent transport trap trash trauma travel
traveler traveller traverse treason treasure treasury treat treatment treaty tree trek tremendous trend trespass trial
tribal tribe tribunal tribute trick tricycle tried trigger trillion trim trip triple triumph trod troll trolley troop
trophy tropical trouble troublemaker trousers truce truck true truly trunk trust trustee truth try tsunami tube
tuition tulip tumble tune tunnel turbine turbulent turmoil turn turnaround turnout turnover turtle tutor tv tweet
twelve twenty twice twin twist two tycoon tying type typhoon typical ugly ultimate ultra umbrella umpire unable
unanimous uncertain uncertainty uncle under underage undercover underdog undergo underground undermine understand
understood underway undo undocumented unearth uneasy unemployment unequivocal unexpected unfair unfold unicorn uniform
unilateral union unique unit unite unity universal universe university unknown unleash unless unlike unlikely unlock
unpaid unprecedented unravel unrest until unusual unveil unwitting up upbeat upcoming update upgrade uphold upon upper
uprising uproar upset upside upstate uptick uranium urban urge urgency urgent us usage use useful user usher usual
utility vacant vacation vaccinate vaccine vacuum valid valley valuable value van vandal vanilla vanish vaping variant
variety various varsity vary vase vast vegan vegetable vegetarian veggie vehicle velvet venom venture venue verbal
verdict verge version versus very vet veteran veto via viable vibrant vicious victim victorious victory video view
viewer vigil vigilante village villain vindicate vineyard vintage vinyl violate violation violence violent viral
virtual virus visa visible vision visit visitor visual vital vivid vlog vocal vodka voice void volatile volcano volume
voluntary volunteer vote voter vow voyage vs vulnerable wackiest wacky waffle wage wagon wait waitress waive wake walk
walkout wall walnut wander wane want war ward wardrobe warehouse warfare warm warming warn warning warrant warrior
warship wary was wash waste watch watchdog water waterfall watt wave way we weak weakness wealth wealthy weapon wear
weary weather web website wedding weed week weekday weekend weekly weeknight weigh weight weird welcome welfare well
wellness went wept were west western wet wetland wetlands whale what whatever wheat wheel wheelchair when whenever
where whether which while whip whirlwind whisper whistleblower white who whole whom whopping whose why wicked wide
widen widespread widow width wield wife wild wilderness wildfire wildlife will willing willow win wind windfall
windmill window windshield wine wing winner winter wipe wire wireless wisdom wise wish with withdraw withdrawal wither
withheld withhold within without withstand witness woe woke wolf wolves woman women won wonder wonderful wood wooden
woodland word wore work workaround workbook worker workforce workout workplace workshop world worldwide worm worn
worry worse worst worth worthy would wound wove woven wow wrangle wrap wrath wreak wreath wreck wreckage wrestle
wrestler write writer written wrong wrongful wrote xenophobic yacht yank yard yeah year yeast yellow yes yesterday yet
yield yoga yogurt you young younger youngest your yourself youth yummy zero zip zone zoo zucchini
"""

# Written with a capital in the middle of a sentence without being a name of its own.
_OFTEN_CAPITALISED = """
a ai airport an and app association at atm avenue bank bay bible bridge captain central ceo cfo championship
championships chief christmas city co college colonel committee company congress conservative corp council county
court cto cup dame day democrat democratic department diy dj dna doctor dr dvd east easter eastern faq federal
federation final for games gdp general global god gov government governor gps great green group halloween hospital
house hr i id in inc institute international internet ipo island jr judge justice king labor labour lady lake league
led liberal llc lord lower ltd mayor minister ministry miss month mountain mr mrs ms mt museum mvp national new north
northern of officer ok old olympic olympics on park parliament party pc pope pr president prime prince princess prof
professor q&a queen rep republic republican rip river road royal saint school sen senate senator sergeant sheriff sir
south southern sr st state states station street supreme suv thanksgiving the to town tv ufo union university upper
usb valley vice vip web week west western world year
"""

# Frequent names that the stripping of endings would take for everyday words.
_NAMES_LIKE_WORDS = """
abbott adams anders anderson austin baker banks barry becker benny bernie betty billie billy blakely bobby booker
brady brandy britain brooks burns butler carly carson carter casey chandler charles charlie clinton cody cole collins
connor cooper crosby daley dallas danny dawson decker denver diana dixon donny edison ellie eric fisher fletcher
foster fowler francis frankie franklin freddie fuller gardner garland gates giles gina hailey harper harrison harry
hastings hawkins hayes helen henry hilary holden holly hooper hopkins india ireland jackie jackson jamie jenner jenny
jerry jimmy jones joyce keller kelly kenny kerry kitty landon larry lester lily lincoln london lynch manning marino
markle marley marlon martin mason mercer miller milner molly morris moses mueller murphy nelson newton nolan oliver
owens pacers packers parker parsons paterson perry peters pitt porter potter proctor reese regan richards richie ricky
riley robby robert roberts robin roger rogers romney ronan rosie ross rover sally sanders sandy saunders sawyer
scotland shelby shelton simon skinner slater snyder spears spencer springer staley stanley sterling stewart sydney
tanner taylor timothy tina tom tony townsend tracy trent tucker turner tyler wagner walker waller wallis walter
walters warner warren washington waters watson weaver webb weber webster wendy wesley wheeler whitney wilder willie
willis wilson winston woods wyatt
"""

# Words for people and things of a country: text word, then what in the content makes it known.
_DEMONYMS = """
afghan:afghanistan america:us,usa,american american:us,usa,america,washington argentine:argentina austrian:austria
belgian:belgium brazilian:brazil britain:uk,british british:uk,britain,england,london canadian:canada
chinese:china,beijing czech:prague dane:denmark danish:denmark dc:washington democrat:democratic,dems
dems:democrats,democratic dutch:netherlands,holland english:england,uk,britain eu:european,europe european:eu,europe
fed:federal filipino:philippines finnish:finland french:france,paris german:germany,berlin gop:republican,republicans
greek:greece hungarian:hungary indian:india,delhi iraqi:iraq irish:ireland israeli:israel italian:italy,rome
japanese:japan,tokyo korean:korea,seoul kremlin:russia,moscow la:angeles mexican:mexico norwegian:norway nyc:york
pentagon:defense,military peruvian:peru polish:poland portuguese:portugal republican:gop russian:russia,moscow
saudi:arabia scot:scotland scottish:scotland spanish:spain swede:sweden swedish:sweden swiss:switzerland thai:thailand
turkish:turkey uk:britain,british,england,kingdom ukrainian:ukraine un:united,nations us:america,american,usa,united
usa:america,american,us vatican:pope welsh:wales
"""


@cache
def english() -> frozenset[str]:
    return frozenset(_ENGLISH.split())


@cache
def often_capitalised() -> frozenset[str]:
    return frozenset(_OFTEN_CAPITALISED.split())


@cache
def names_like_words() -> frozenset[str]:
    return frozenset(_NAMES_LIKE_WORDS.split())


@cache
def demonyms() -> dict[str, frozenset[str]]:
    """What in a content makes a word for a country's people known: `swiss` -> {`switzerland`}."""
    pairs = (entry.split(":") for entry in _DEMONYMS.split())
    return {word: frozenset(places.split(",")) for word, places in pairs}

"""Everyday words, so that a capitalised, katakana or kanji word in a headline is not taken for a name.

Base forms only: the name check strips plurals, tenses, comparatives and the like. Written by hand for this package from
the vocabulary of news; a missing word costs a needless fallback, a name in here costs a missed invention.
"""

from __future__ import annotations

from functools import cache

_ENGLISH = """
a abide ability able aboard abolish abortion about above abrupt absent absolute absolutely absorb absurd abundance
abundant abuse accelerate accept access accessory accident accidentally accommodate accompany accomplish accord
account accountant accumulate accuse achieve acknowledge acquire acquit across act action active activism activist
activity actor actress actual ad adamant adapt add address adequate adhere adjacent adjust administrate administrator
admire admission admit adolescent adopt adorable adore adult advance adventure advertise advice advise advocate aerial
aesthetic affair affect affection affirm afford afraid after aftermath again against age agency agenda agent aggravate
aggressive agile aging ago agonize agree agreement ahead aid aide aim air aircraft airline airman airplane airport
airspace airstrike airy aisle alarm album alcohol alert algorithm alien alike alive all allegation allege alleged
allegedly allergy alley alliance allocate allow ally almost alone along already also alter alternate alternative
although altitude always am amateur amaze amazing ambassador ambition ambitious ambulance amend amendment amid amnesty
among amount ample an analogy analysis analyst analyze anarchy anchor ancient and angel anger angle angry animal
anniversary announce announcement annoy annual anonymous another answer ant anti anticipate antique antithetical
anxiety anxious any anybody anymore anyone anything anyway apart apartment apologize apology app apparent apparently
appeal appear appearance appetite applaud applause applicant apply appoint appreciate apprentice apprenticeship
approach appropriate approval approve apron aquatic arc arcade arch archaeologist archeologist archive are area arena
argue argument arise arm armed armor armour army aroma around arrange arrest arrive arrow art article artificial
artillery artisan artist as ascend ash ashamed aside ask aspire ass assassin assault assemble assembly assert assess
asset assign assist assistance assistant associate assume assure astonish astronaut astronomer asylum at athlete
atmosphere atom atop attach attack attempt attend attention attic attitude attorney attract attribute auction audience
audio audiobook audit auditorium aunt austerity author authority autism auto automaker automate autumn available
avalanche average aviation avoid await awake award aware away awful awhile awkward awry baby back background backlash
backpack backup backyard bad badge bag bail bait bake bakery balance balcony ball balloon ballot ban banana band bank
banker bankrupt bankruptcy banquet bar barbecue bare barely bargain barn barrel barricade barrier base baseball bash
basic basically basis basket basketball bat bath bathroom batter battery battle be beach bead beam bear beard beast
beat beau beautiful beauty became because become bed bedroom bedtime bee beef been beer before beg began begin begun
behalf behavior behaviour behead behind being belief believe bell belong beloved below belt bench bend beneath benefit
bent beside besides besiege best bestow bestseller bet betray better betting between beverage beware bewilder beyond
bias bibliophile bicycle bid big bigger biggest bike bilateral bill billion billionaire bind binge biodiversity
biography biologist bipartisan bird birdwatcher birth birthday birthplace bitcoin bite bitten bitter bizarre black
blackout blame blank blanket blast blaze bleak bled bleed blend bless blew blind blink bliss blitz blizzard block
blockbuster blockchain blog blood bloodshed bloody bloom blossom blow blown blue blueprint blunder blur board
boardwalk boast boat body bodycam bogus boil bold bolster bomb bombshell bond bone bonfire bonus boo book bookmobile
bookshop bookstore bookworm boom boost boot booze border borderline bore born borough borrow boss botanical botch both
bother bottle bottom bought bounce bounty boutique bow box boy boycott boyfriend bracelet braces bracket brain
brainstorm brainteaser brake branch brand brass brave brawl breach bread break breakfast breakthrough breast breath
breathe breathtaking bred breed breeze brew bribe brick bride bridge brief bright brilliant brim bring brink brisk
broad broadband broadcast broke broken broker bronze brother brought brown browse brunch brush brutal bubble bucket
bud buddy budget buffet bug build building built bulb bulk bull bullet bully bumpy bunch bunny burden bureau
bureaucracy burger burglar burial burn burrito burst bury bus bush business businessman businesswoman bust bustle busy
but butcher butter butterfly button buy buyer buzz by bye bylaw bystander cabbage cabin cabinet cable cactus cafe cage
cake calculate calendar call calm calorie came camel camera camp campaign campground campus can canal cancel cancer
candid candidacy candidate candle candlelight candy canine cannabis cannon cannot canopy canvas canyon cap capable
capacity capital capitalism captain captivate capture car caravan carbon card cardboard care career careful caregiver
caretaker cargo carnival carpenter carpet carpool carry cart cartoon case cash casino cast castle casual cat catalog
catastrophe catch catcher category cater cathedral cattle caucus caught cause caution cautious cave cease cedar
ceiling celeb celebrate celebrated celebration celebratory celebrity cell cellphone cement cemetery censure cent
center central centre centrifuge century ceramic ceremony certain certainly certificate certify chain chair chairman
challenge chamber champion championship chance change channel chant chaos chapel chaplain chapter character charcoal
charge charger charity charm chart charter chase chat chatbot cheap cheat check cheek cheer cheerful cheese cheesecake
chef chemical chemistry cherish cherry chess chest chew chic chicken chief child childcare childhood children chill
chilly chimney chip chipmaker chocolate choice choir choose chore chorus chose chosen chronic chronicle chunk church
cider cigarette cinema cinnamon circle circuit circular circulation circumstance circus cite citizen city civic civil
civilian claim clap clarify clash class classic classify classroom clay clean clear clearly clergy cleric clerk clever
click client cliff climate climb clinch cling clinic clinical clinician clip cloak clock close closely closer closet
closure clothes clothing cloud club clue clumsy clung cluster clutch clutter co coach coal coalition coast coastal
coastline coat cobble cocaine cockpit cocktail coconut code coffee coffin coin coincide cold coleslaw collaborate
collapse collar colleague collect collection college collide collision collude collusion colony color colorful colour
column coma combat combine combust come comeback comedian comedy comet comfort comic coming command commander
commemorate commend comment commentary commentate commerce commercial commission commissioner commit committee common
commotion communal communicate community commute companion company compare comparison compass compassion compel
compensate compete competition competitor complain complaint complete completely complex complicated compliment
compose composer compost compostable compound comprehensive comprise compromise compute computer con conceal concede
conceive concept conceptual concern concert concession conclude concrete condemn condition condo conduct conference
confess confidence confident confine confirm conflict conform confront confuse congestion congratulate congress
congressional congressman congresswoman connect conquer conscious consensus consent consequence consequent
conservation conservative consider consist console conspicuous conspiracy conspire constant constituent constitution
constitutional constrain construct construction consult consultant consume consumer contact contain contaminate
contemplate contemporary contempt contend contender content contest contestant context continue contour contract
contractor contradict contrast contribute control controversial controversy convene convenience convenient convention
conversation conversion convert convict convince convoy cook cookbook cool cooperation cooperative coordinate cop cope
copy coral cord core corn corner cornerstone corona coronavirus corporate corporation correct correspond corridor
corrode corrupt corruption cosmic cost costar costly costume cosy cottage cotton couch could council councillor
councilor counsel count countdown counter counterfeit countless country countryside county coup couple courage
courageous courier course court courthouse courtyard cousin cover coverage covid cow coworker coziest cozy crack
crackdown cradle craft craftsman craftsmanship cram crane crap crash crater crave crawl crayon crazy creak cream
create creative creator creature credible credit creek creep crept crest crew cricket cried crime criminal crisis
crisp critic critical criticise criticism criticize crocodile crooked crop cross crossing crossroads crosswalk crow
crowd crowded crowdfunding crown crucial crude cruel cruelty cruise crumb crumble crunch crush crust cry crypto
crystal cub cube cuisine cult cultivate cultural culture cunning cup cupcake curator curb cure curious currency
current currently curse curtail curtain curve cushion custody custom customer cut cute cyber cyberattack cycle cyclist
cyclone dad daily dainty dairy dam damage damp dance danger dangerous dangle dare daring dark darling dash dashboard
data database date daughter daunting dawn day daycare daylight dazzle dazzling dead deadline deadly deal dealer dealt
dear death debacle debate debris debt debtor debunk debut decade decay deceive decency decent decide decision deck
declare decline decor decorate decoration decrease decriminalize decry dedicate deem deep deeper deepfake deer defeat
defect defence defend defendant defender defense defiance defiant deficit define definitely definition deforestation
defy degree delay delegate delete deliberate delicacy delicate delicious delight deliver delivery demand dementia
democracy demolish demolition demonstrate denial denounce density dental deny depart department depend dependent
depict deploy deport deposit depression deprive depth deputy derail derby derive dermal dermatologist descend
descendant describe desert deserve design designer desirable desire desk despair desperate despite dessert destination
destiny destroy destruction detail detain detect detective deteriorate determine detour devastate develop development
device devil devote devour diabetes diabetic diagnose diagnosis dialect dialog dialogue diamond diary dictate did die
diesel diet dietitian differ difference different difficult dig digital dignity dilemma dilute dim dine diner dining
dinner dinosaur dip diploma diplomacy diplomat diplomatic direct direction directly director dirt dirty disability
disable disabled disadvantage disagree disappear disappoint disaster discard discipline disclose discount discourage
discover discovery discriminate discuss discussion disease disgrace disguise disgust dish dismantle dismay dismiss
disorder dispatch dispense display dispute disrupt dissent dissolve distance distant distinct distort distract
distraught distress distribute distributor district disturb ditch dive diverse diversify diversity divide dividend
divine division divorce dizzy do doc docile dock doctor document documentary does dog doing doll dollar dolphin dome
domestic dominant dominate donate donation done donor donut doomsday door doorbell doorstep doorway dope dormitory
dose dot double doubt dough doughnut down downfall downgrade downpour downtown downturn dozen draft drag dragon drain
drama dramatic drank draw drawing dread dream dreary dress drew drift drill drink drive driven driver drizzle drone
drop droplet drought drove drown drug drum drunk dry dual dub dubious duck dude dudes due duel dug dumb dump dumpling
during dusk dust dusty duty dwarf dwell dwindle dye dying dynamic dynasty each eager eagle ear early earn earnest
earnings earring earth earthquake earthquakes ease easel easy eat eaten echo eclipse ecologist ecology economic
economist economy ecosystem edge edible edit edition editor editorial educate education educator eerie effect
effective efficiency efficient effort egg eight either elaborate elbow elder elderly elect election electoral electric
electrician electricity electrify electronic elegance elegant element elephant elevate eleven eligible eliminate elite
else elsewhere email embark embarrass embassy embattled embed embrace emerald emerge emergency emission emissions emit
emoji emotion emotional empathy emperor emphasis empire employ employee employer employment empower empty enable
enchant enclose encounter encourage end endanger endeavor endless endorse endure enemy energetic energy enforce engage
engine engineer engrave enhance enjoy enlarge enlighten enlist enormous enough enrage enrich enroll ensemble ensue
ensure entangle enter enterprise entertain entertainment enthusiasm entice entire entirely entrance entrepreneur
entrust entry envelope environment environmental envision envoy envy epic epicenter epidemic episode equal equality
equate equator equip equity era erase erode erratic error erupt escalate escalator escape escort especially espionage
essay essence essential establish estate estimate estrange eternal ethic ethnic euphoric euro evacuate evacuee
evaluate evangelical evangelist evaporate eve even evening event eventually ever every everybody everyday everyone
everything everywhere evict evidence evident evil evolution evolve ex exact exactly exaggerate exam examine example
exasperate excavate exceed excellent except excerpt excess exchange excite exclude exclusive excuse execute executive
exempt exercise exhale exhaust exhausted exhibit exhibition exile exist exit exodus exotic expand expansion expect
expectation expel expense expensive experience experiment expert expertise expire explain explicit explode exploit
explore explosion explosive expo export expose exposure express expulsion exquisite extend extension extensive extent
exterior external extinct extort extra extract extradite extradition extraordinary extreme extremely eye eyebrow
eyewitness fable fabric fabulous face facility fact faction factor factory faculty fade fail failure faint fair fairy
fairytale faith fake fall fallen fallout false fame familiar family famous fan fantastic fantasy far fare farewell
farm farmer farming farmworker fart fascinate fascist fashion fashionable fast faster fat fatal fate father fatigue
faucet fault favor favorite favour favourite fear fearsome feast feather feature fed federal fee feeble feed feedback
feel feet fell fellow felon felony female feminism feminist fence ferry ferryman fertile fertilizer festival festive
fetch feud fever few fewer fiance fiasco fiber fiberglass fiction fiddle field fierce fiery fifth fifty fight fighter
figure file fill film filter filth filthy final finale finalist finalize finally finance financial find finding fine
finely finger finish fintech fire firefighter firefly fireman firemen fireplace fireworks firm first fish fisherman
fishermen fishing fit fitness five fix flag flagship flame flank flare flash flashback flat flatter flaunt flavor
flavour flaw flea fled flee fleece fleet flesh flew flexible flicker flight flip float flock flood floodgate flooding
floor flour flourish flow flower flown flu fluffy fluid flute fly flyover foam focus foe fog foggy foil fold folk
folklore follow following food fool foolish foot footage football footbridge footpath footprint for forage forbid
force forcibly forecast foreground foreign foresee foresight forest forever forfeit forgave forge forget forgive
forgiven forgot forgotten fork forklift form formal former formula fort forth fortunate fortune forty forum forward
fossil foster fought found foundation founder fountain four fourth fox frack fraction fragile fragment fragrance frail
frame franchise frank frantic fraternity fraud fray freak free freedom freelancer freeze freezer freight frenzy
frequent fresh freshly freshman fret friction fridge friend friendly friendship fries frighten fringe frog from front
frontier frontline frontrunner frost frosting froze frozen frugal fruit frustrate fuel fugitive fulfill full fully
fumble fun function fund fundamental fundraise fundraiser funeral fungus funny fur furious furlough furnace furniture
furor furry further fury fuse fuss future gadget gaffe gain gala galaxy gallery gallon gallop gamble game gaming gang
gap garage garbage garden garlic garment gas gate gateway gather gauge gave gay gaze gear geese gem gender gene
general generate generation generosity generous genetic genius genocide genre gentle gentleman genuine geothermal
gerrymander gesture get getaway getting ghost giant gift gig gigantic giggle ginger gingerbread girl girlfriend give
given glacier glad glamour glance glare glass glaze gleam glide glimmer glimpse glitch glitter global globe gloom
gloomy glory glove glow glue gluten gnaw go goal goalkeeper goat god goes gold golden golf gone good goodbye goods
goose gorgeous gossip got gourmet govern government governor gown grab grace graceful grad grade gradual graduate
grain grammar grand grandchild grandchildren grandfather grandma grandmother grandpa grandparent grant graphic grapple
grasp grass grateful gratitude grave gravel graveyard gravity gray graze grease great greed green greenery greenhouse
greenway greet grew grey grid gridlock grief grievance grieve grill grim grin grind grip groan grocery groom grope
gross ground groundbreaking group grove grow growl grown growth grueling guacamole guarantee guard guardian
gubernatorial guess guest guidance guide guideline guild guilt guilty guitar gulf gun gunfire gunman gunmen gust gut
guy gym gymnast gymnastics habit habitat hack hacker had hail hair half halftime hall halloween halt halves hamlet
hammer hand handbook handcraft handcuff handful handle handmade handy hang happen happy harass harassment harbor hard
hardly hardship hardware harm harmony harness harrowing harsh harvest has hat hatch hatchery hate hatred haul haunt
have haven having havoc hawk hay hazard he head headache headline headlong headphone headquarters headteacher headwind
heal health healthy hear heard hearing heart heartbreak heartbroken heartfelt hearth heartland hearts heartwarming
heat heatwave heaven heavy heavyweight heckle hedge hefty height heighten heir heirloom heist held helicopter hell
hello helm helmet help hemp hence her herald herb here heritage hero heroes herself hesitant hesitate hey hid hidden
hide hideout high higher highest highland highlight highway hijab hijack hike hiker hilarious hill hillside him
himself hinder hinge hint hip hire his historian historic historical history hit hitter hive hoard hoax hobby hoist
hold holder hole holiday hollow holy home homebuyer homeless homemade homeowner homer hometown homework homicide
honest honey honeymoon honk honor honour hoodie hook hoop hop hope hopeful horizon hormone horn horrendous horrible
horrific horror horse hospitable hospital hospitality hospitalize host hostage hostile hot hotel hour house household
housing hover how however hug huge hum human humanitarian humanity humble humid humiliate humor hundred hung hunger
hungry hunt hunter hurdle hurdles hurricane hurry hurt husband hush hut hybrid hydrogen hydropower hygiene hype
hypocrisy i ice icicle icon iconic icy idea ideal identical identify identity ideological ideology idle idol idyllic
if ignite ignore ill illegal illness illustrate image imaginative imagine imitate immediate immense immerse immigrant
immigration imminent immune impact impasse impatient impeach implement implode imply import importance important
impose impossible impound impress impressive imprint impromptu improve impunity in inaugural inaugurate incarcerate
inch incident incite incline include inclusive income increase incredible incumbent indefinite independence
independent index indicate indict indigenous individual indoor induce indulge industrial industrious industry
inequality inevitable infant infect infection infectious inferno inflation inflict influence influencer influential
inform information infrared infrastructure infringe ingenious ingredient inhabit inhale inherent inherit initial
initiative inject injection injure injury inland inmate inn inner inning innocent innovation innovative innovator
input inquiry insane inscribe insect inside insider insight insist inspect inspector inspiration inspire install
instance instant instead instinct institute institution instruct instructor instrument insulate insulation insulin
insult insurance insure insurgent insurrection intact integrate integrity intellectual intelligence intend intense
intensify intention interactive interest interfere interim interior intermittent intern internal international
internet interpret interrupt intersect interstate intervene intervention interview intimate intimidate into intricate
intrigue introduce intruder invade invaluable invasion invent inventor invest investigate investigation investigator
investment investor invisible invite involve iphone ipo irate irk iron ironic irrigation is island isolate issue it
item its itself ivory jacket jackpot jagged jail jam jar jaw jazz jealous jeans jelly jeopardize jeopardy jersey jet
jewel jewelry jigsaw job jog join joint joke jolly jolt journal journalism journalist journey joy joyful jubilant
judge judicial juggle juice jump jungle junior junk juror jury just justice justify juvenile kayak keen keep kept
ketchup kettle key keyboard keynote kick kickoff kid kidnap kidney kill killer kind kindergarten kindergartner
kindness king kingdom kiosk kiss kit kitchen kite knee kneel knelt knew knife knight knit knives knob knock knockout
knot know knowledge known lab label labor laboratory labour lack ladder lady laid lain lake lament lamp land landfall
landfill landlord landmark landscape landslide lane language languish lantern lap laptop large largest lasagna laser
lash last late later latest latitude laugh laughter launch laundry laureate lavender lavish law lawmaker lawn lawsuit
lawyer lay layer layoff layout layover lb lbs lead leader leadership leaf leafy league leak lean leap leapt learn
lease least leather leave lecture led ledge left leftover leg legacy legal legalize legend legendary legion
legislation legislature legitimacy legitimate leisure leisurely lemon lemonade lend lender length lenient lens lent
lentil less lesson let lethal letter lettuce levee level lever leverage liability liaison liberal liberty librarian
library licence license lie life lifeguard lifeline lifestyle lifetime lift liftoff light lighthouse lightning like
likely lily limbo limestone limit limited line linebacker linen lineup linger link lion lip liquid list listen lit
literal literary literature litigation litter little live lively lives livestock livestream living lizard load loaf
loan lobby lobbyist local locally locate location lock lockdown lodge lofty log logic logistic lone lonely long longer
longing longtime look lookout loom loop loophole loose loot lord lose loser loss lost lot lotus loud love lovely lover
low lower lowest loyal luck lucky lucrative ludicrous lullaby lumber luminous lunch lung lure luxury lying mace
machine mad made magazine maggot magic magical magician magistrate magnet magnetic magnificent magnitude mail main
mainland mainstream maintain majestic major majority make makeover maker makeshift makeup making male malice mall
malware mammal man manage manager mandate mandatory maneuver mango manhunt manipulate manner mansion manual
manufacture manuscript many map maple mar marathon marathoner marble march margin marijuana marina marine maritime
mark market marketplace maroon marriage marry marsh mascot mask mass massacre massage massive master mastermind
masterpiece match matchup mate material math mathematician matter mattress mature may maybe mayhem mayor mayoral maze
me meadow meal mean meander meaning meant meanwhile measles measure meat mechanic mechanical mechanism medal medalist
meddle media mediate medical medication medicine medieval meditation medium meet meeting mega melodic melody melt
member meme memo memoir memorable memorial memory men menace mend mental mention mentor menu merch merchant mere merge
merger merit mermaid mess message met metal meteorologist method metro mic mice microchip microplastic microwave mid
midday middle middleman midfielder midnight midterm midtown might migrant migrate migration mild mile mileage
milestone militant military militia milk mill million millionaire mimic mind mindful mine miner mineral mingle mini
minimum mining minister ministry minivan minor minority minute miracle miraculous mirror misconception misconduct
misdemeanor misfortune mishap misogyny miss missile mission mist mistake mitten mix moat mob mobile mobilize mock mode
model moderate moderator modern modest mogul moist moisturizer mold mom moment momentous momentum monarch money
monitor monk monkey monolith monopoly monoxide monsoon monster month monument mood moon moonlight moral moratorium
more moreover morning mortgage mosaic mosque mosquito moss most mostly motel mother motherhood motif motion motivate
motive motor motorcycle motorist mound mount mountain mourn mouse mouth move movement movie much mud muffin mug mull
multi multimillion multiple multiply multitude mum mumble municipal municipality mural murder murderer muscle muse
museum mushroom music musical musician must mustard mute mutual my myriad myself mysterious mystery myth nab nail
naive naked name napkin narrate narrative narrow nasty nation national nationalist nationwide native natural
naturalisation naturalist nature naval navigate navigator navy near nearby nearly neat necessary neck necklace nectar
need needle negative neglect negotiate negotiation neighbor neighborhood neighbour neither neo neon nephew nepotism
nerve nervous nest net network neutral never new newborn newcomer newly news newspaper next nice niece night nightfall
nightlife nightmare nine no nobody noise nominate nomination nominee non none nonprofit noodle nor normal north
northeast northern northwest nose nostalgia nostalgic not notable note notebook nothing notice notion notorious
nourish novel novelist novice now nuclear nudge nuke number numerous nun nurse nursery nurseryman nurture nut
nutrition oak oasis oat oath oatmeal obedient obesity obey obituary object objective oblige obscure observe obsess
obsession obstacle obstruct obtain obvious occasion occupant occupy occur ocean octopus odd odds of off offend
offender offense offensive offer office officer official offline offseason offset offshore often oh oil ok okay old
oldest olive ominous omit on onboard once one ongoing onion online only onscreen onshore onslaught onstage onto open
opener opening opera operate operation opinion opioid opponent opportunity oppose opposite opposition opt optimism
optimistic optimize optimum option or orange orbit orbital orchard orchestra ordeal order ordinary organ organic
organisation organization organize organizer orient origin original ornament ornate orphan other otherwise ought our
ourselves oust out outage outbreak outcome outcry outdoor outer outfit outing outlast outlaw outlet outline outlook
outpace outperform output outrage outreach outright outscore outside outsider outskirts outspoken outstanding oven
over overall overcome overdose overdue overflow overhaul overlap overlay overlook overnight override overrun oversee
oversight overtake overtime overturn overwhelm owe owl own owner ownership oxygen oyster pace pack package pact pad
paddle page pageant pageantry paid pain painful paint painter painting pair pal palace pale palm pan pancake pandemic
panel panic panicking pant pantry pants paper par parachute parade paradise paramedic parcel parchment parent
parenting park parking parliament parliamentary parody parole part partial participant participate particular partisan
partly partner partnership party pass passage passenger passion passport past pasta pastel pastime pastor pastry
pasture patch patchwork patent path pathway patience patient patio patriot patrol patron pattern pause pave pavement
pavilion paw pay payday payment payout payroll peace peaceful peach peak peanut pear peasant pebble peculiar pedal
pedestrian peer pen penalty pencil pendulum penguin penny pension pensioner people pepper per percent percentage perch
perfect perform performance performer perfume perhaps peril period perish perjury permanent permission permit perplex
persecute persevere persist persistence person personal personality perspective persuade peso pesticide pet petal
petition petty phase phenomenon philosophy phone photo photograph photographer photoshoot phrase physical physician
physics physiotherapist physique pianist piano pic pick picket pickle pickup picture pie piece pier pigeon pile
pilgrim pilgrimage pill pillar pillow pilot pin pinch pink pinpoint pioneer pipe pipeline piracy pirate pitch pitcher
pity pivot pivotal pizza placate place placid plague plain plaintiff plan plane planet plank planner plant plantation
plastic plate plateau platform play playbook player playful playground playlist playoff playwright plaza plea plead
pleasant please pleasure pledge plentiful plenty plight plot plow plug plumber plummet plunder plunge plus ply poach
pocket podcast podium poem poet poetry point poise poised poison poker polarize pole police policy polish polite
political politician politics poll pollen pollinator pollution pond ponder pool poor pop pope popular populate
population populist porcelain porch pork porn port portable portfolio portion portrait portray portrayal pose position
positive possess possession possibility possible post postal postcard postmaster postpartum postpone pot potato
potential pottery pouch poultry pound pour poverty powder power powerful practical practice praise prank pray prayer
pre preach precaution precedent precious precise precision predecessor predict prediction predominant prefer pregnancy
pregnant prejudice preliminary premier premiere premises premium prep preparation prepare preschool presence present
preservation preserve presidency president presidential press pressure prestige prestigious pretend pretty prevail
prevent preview previous prey price pride priest priestess primary prime prince princess principal principle print
prior prioritize priority prison prisoner pristine privacy private privilege prize pro probable probation probe
problem procedure proceed proceeding process procession proclaim produce producer product production profession
professional professor proficient profile profit profound program programme progress progressive prohibit project
prolific prolong prom promenade prominent promise promote prompt promptly prone proof prop propaganda propel propeller
proper property proportion proportionate proposal propose prosecute prosecution prosecutor prospect prosper prosperity
prostitute prostitution protect protection protein protest protester proud prove proven provide province provision
provoke proximity proxy prune psychic psychologist psychology public publication publicity publish publisher pudding
puddle pull pulp pulse pump pumpkin punch pundit punish punishment punitive pupil puppet puppy purchase pure purge
purify purpose pursue pursuit push put puzzle quack quaint quake qualify quality quantity quarantine quarry quarter
quarterback quarterfinal quarterly quay queen queer quell quench query quest question queue quick quicken quickly
quiet quilt quirky quit quite quiver quiz quota quote rabbit rabid raccoon race racial racism racist radar radiant
radiate radical radio raft rage ragged raid rail railroad railway rain rainbow rainfall rainwater raise rake rally ram
ramble ramification ramp rampage rampant ran ranch random rang range rank ransom rant rap rape rapid rapids rapper
rare rash rat rate rather rating ratio ration ravage rave ravine raw razor reach react reaction read reader ready real
realistic reality realize really realm reap rear rearrange reason reassure rebate rebel rebellion rebirth reboot
rebound rebuff rebuild rebuke recall recap recede receipt receive recent recently receptive recess recession recipe
recipient recite reckless reckon reclaim recognise recognition recognize recollect recommend reconcile record recount
recover recovery recreate recreation recruit rectangle rectify recur recyclable recycle red redefine redemption
redesign rediscover reduce reduction reed reef refer referee referendum refine refinery refit reflect reform refrain
refresh refreshing refrigerator refuge refugee refund refuse refute regain regard regatta regime region regional
register registration regret regular regulate regulation regulator regulatory rehab rehearsal rehearse reign reinforce
reinstate reinvent reject rejoice rejuvenate relate relation relationship relative relax relay release relegate
relentless relevant reliant relic relief reliever religion religious relinquish relish relive reluctant rely remain
remake remark remarkable rematch remedy remember remind remorse remote removal remove renew renewable renovation
renown renowned rent rental reopen repair repatriate repay repeal repeat repel replace replacement replenish replica
reply report reporter represent representative repress reprieve republic reputation request require reroute rescue
rescuer research researcher resemble reserve reservoir resettle reshape reside residence resident residential resign
resignation resilience resilient resist resistance resolution resolve resort resource respect respond response
responsible rest restaurant restless restore restrain restrict restriction result resume resurge resurgence resurrect
retail retailer retain retaliate retire retiree retirement retort retrain retreat retrieve retro retrofit return
reunion reunite reusable revamp reveal revelation revenge revenue reverence reversal reverse review revise revive
revoke revolt revolution reward rewrite rhetoric rhyme rhythm ribbon rice rich rid ridden ride rider ridership ridge
ridicule rifle rift right ring riot rip ripe ripen ripple rise risen risk risky ritual rival river riverfront road
roadworks roam roar roast rob robber robbery robin robot robotaxi robust rock rocket rocky rode role roll roller
rollout romance romantic romp roof rooftop rookie room root rope rose roster rot rotate rotten rough round roundup
rout route routine row royal rub rubber rude rugged ruin rule ruler rumor rumour run runaway rung runner runoff runway
rural rush rust rustic rusty ruthless sabotage sack sacred sacrifice sad saddle safe safer safety saga said sail
sailor saint sake salad salary sale salmon salon salt salute salvage same sample sanction sanctuary sand sandwich
sandy sang sanitation sanitizer sank sapling sassy sat satellite satire satirical satisfaction satisfy sauce saucer
sausage save saving savor savvy saw say saying scaffold scale scam scan scandal scandalous scar scare scarf scary
scathe scatter scenario scene scenic scent schedule scheme scholar scholarship school science scientific scientist
scissors scoop scooter scope scorch score scorer scour scout scramble scrap scrape scream screen script scrub
scrutinize scrutiny sculpt sculptor sculpture sea seafood seal seam search seaside season seasonal seasoned seat
seawall seclude secluded second secret secretary section sector secure security see seed seedling seek seem seen
segment segregate seismic seize seizure select selection selective self selfie sell selves semi semiconductor
semifinal senate senator send senior sensation sensational sense sensitive sensor sensory sent sentence separate
sequel sequence serene serenity serial series serious serve server service session set setback setting settle
settlement settler seven sever several severance severe severity sew sewage sewn sex sexual shabby shack shade shadow
shady shake shaky shall shallow shame shape share shareholder shark sharp shatter she shed sheep sheer sheet shelf
shell shelter shelves shepherd sheriff shield shift shimmer shine ship shipbuilder shipment shipyard shirt shiver
shock shoe shone shook shoot shooter shootout shop shopkeeper shopper shopping shore shoreline short shortage
shortfall shortlist shot should shoulder shout shove shovel show showbiz showcase showdown shower shown shrank shred
shrimp shrine shrink shrug shun shut shutdown shutout shutter shuttle shy sibling sick side sidewalk siege sigh sight
sign signal signature significant signify silence silent silk silly silver similar simmer simple simplicity simplify
simply sin since sincere sing singer single sink siphon sir sister sit site situation six size skate skateboard
skatepark skater skeleton skeptic sketch sketchbook skewer ski skill skillful skin skip skirmish skirt sky skydive
skyline skyrocket skyscraper slack slain slam slash slate slaughter slave slavery sled sleep slender slept sleuth
slice slick slid slide slight slim slip slippery slogan slope slow slowdown slugger slump slung smack small
smallholder smart smartphone smash smear smell smile smog smoke smokestack smoking smooth smug smuggle smuggler snack
snake snap snarky sneak snow snowfall snowstorm snowy snub so soak soap soar sober soccer sociable social socialist
socialite society socioeconomic sock socket soda sodium soft software soil solar sold soldier sole solemn solicit
solid solidarity solitary solo solution solve somber some somebody someone something sometimes somewhere son song soon
soothe soothing sophisticated sore sorrow sorry sort sought soul sound soundtrack soup source south southeast southern
southwest souvenir sovereign space spacecraft spacious spam spare spark sparkling spat speak speaker spearhead special
specialist species specific specimen spectacle spectacular spectator speculate sped speech speed speedy spell spend
spent sperm sphere spice spicy spider spies spike spill spin spinach spiral spirit spiritual splash splendid split
spoil spoiler spoke spokesman spokeswoman sponsor spontaneous sport spot spotless spotlight sprang sprawl spray spread
spree spring sprinkle sprint sprinter sprout sprung spun spur spy squad square squeak squeeze squirm squirrel stab
stabbing stability stable stack stadium staff staffer stage stagnate stain stair staircase stake stalemate stalk stall
stamina stamp stance stand standard standoff standout star stare start starter startle startup starve state statement
station stationery stationmaster statistic statue status stay steadfast steady steak steal stealth steam steel
steelmaker steep stellar stem stench step stepfather stepmother stew steward stick stifle still stimulus sting stir
stitch stock stockpile stole stolen stomach stone stood stool stop storage store stories storm stormwater story
storyline stout stowaway straight strain strand strange stranger strap strategic strategist strategy straw strawberry
stray streak stream streamline street streetcar streetlight strength stress stretch strict stride strike striker
striking string strip stripe strive strode stroke stroll stroller strong stronger stronghold struck structure struggle
stuck student studio study stuff stumble stun stung stunning stunt stupid sturdy style subdue subject sublime
submarine submerge submit subpoena subscriber subscription subsidize subsidy substance substantial substitute subtle
suburb suburban subway succeed success successful succumb such sudden sue suffer sugar suggest suicide suit suitcase
suite sum summer summit summon sun sung sunlight sunny sunrise sunscreen sunset sunshine super superb superhero
superior supermarket superstar supervise supervisor supper supple supply support supporter suppose suppress
supremacist supremacy supreme sure surf surface surge surgeon surgery surpass surplus surprise surreal surrender
surrogate surround surveillance survey surveyor survival survive survivor suspect suspend suspense suspenseful
suspension suspicion suspicious sustain sustainable swallow swam swamp swan swap swarm swath sway swear sweat sweater
sweatpants sweep sweepstakes sweet swell swept swift swim swimmer swimsuit swindle swing swipe swirl switch swollen
swoop sword swore sworn swung symbol symbolic symmetry sympathetic sympathy symptom synagogue syndrome synthetic syrup
system table tablet tabletop taboo tackle tactic tail tailor tailwind take takeaway takedown takeout takeover taking
tale talent talented talk tall tamper tangerine tangle tank tantrum tap tape tapestry target tariff tarmac tarnish
task taskforce taste tasty tattoo taught taunt taut tavern tax taxi taxpayer tea teach teacher teahouse team teapot
tear tease tech technical technique technology tedious teen teenage teenager teeth telecom telegram telephone
telescope television tell temper temperature temple temporary tempt temptation ten tenancy tenant tend tender tennis
tense tension tent tentative tequila term terminal terminate terrace terrain terrestrial terrible terrific terrify
territory terror terrorism terrorist test testament testify testimony text textbook than thank thankful thanksgiving
that thaw the theater theatre theft their them theme themselves then theory therapist therapy there these they thick
thicket thief thieves thin thing think third thirst thirsty thirty this thorn thorough those though thought thoughtful
thousand thread threat threaten three threshold threw thrift thrifty thrill thriller thrive throat throne through
throughout throw throwback thrown thrust thug thumb thunder thus thwart ticket tidal tide tie tiebreak tiger tight
tightrope till timber time timeless timeline timely times timetable timid tinker tiny tip tire tireless title to toast
tobacco today toddler together toilet token told tolerate toll tollbooth tomato tomorrow ton tone tongue tonight too
took tool tooth top topic topple torch tore torn tornado torrent tortilla torture toss total touch touchdown
touchscreen tough tour tourism tourist tournament tout toward tower town townhouse townspeople toxic toxin toy trace
track tract tractor trade trademark trader tradition traditional traffic trafficking tragedy tragic trail trailer
train trainee trainer trainspotter trait tram tramline trample trampoline trance tranquil tranquility transaction
transatlantic transcript transfer transform transgender transit transition translate transnational transparent
transport trap trash trauma travel traveler traveller traverse trawler treacherous tread treason treasure treasury
treat treatment treaty tree treehouse treetop trek tremble tremendous trench trend trespass trial tribal tribe
tribunal tribute trick trickle tricycle tried trigger trillion trim trinket trip triple triumph triumphant trod troll
trolley troop trophy tropical trouble troublemaker trousers trout truce truck true truly trumpet trunk trust trustee
truth try tsunami tube tuck tug tuition tulip tumble tumult tune tunnel turbine turbulent turf turmoil turn turnaround
turnout turnover turtle tutor tv tweet twelve twenty twice twilight twin twinkle twist two tycoon tying type typhoon
typical tyranny ugly ultimate ultra umbrella umpire unable unanimous uncertain uncertainty uncle uncover under
underage undercover underdog undergo underground underline undermine undersea understand understood undertake underway
undo undocumented unearth uneasy unemployment unequivocal uneven unexpected unfair unfold unforgettable unicorn
uniform unify unilateral union unique unit unite unity universal universe university unknown unleash unless unlike
unlikely unlock unpaid unprecedented unpredictable unravel unrest unsurprising until untold unusual unveil unwind
unwitting up upbeat upbringing upcoming update upgrade uphill uphold upkeep upland upon upper upright uprising uproar
uproot upset upside upstairs upstate uptick uranium urban urge urgency urgent us usage use useful user usher usual
utensil utility vacant vacate vacation vaccinate vaccine vacuum vague valiant valid valley valuable value valve van
vandal vanilla vanish vanity vaping vapor variant varied variety various varsity vary vase vast vegan vegetable
vegetarian veggie vehicle velvet vendor venerable venom venture venue verbal verdict verge verify verse version versus
vertical very vessel vet veteran veto via viable vibrant vicious victim victorious victory video view viewer vigil
vigilante vigor villa village villain vindicate vineyard vintage vinyl violate violation violence violent violin viral
virtual virtue virus visa visible vision visit visitor visual vital vivid vlog vocal vodka voice void volatile
volcanic volcano volume voluntary volunteer vote voter vow voyage vs vulnerable wackiest wacky waffle wage wagon waist
wait waitress waive wake walk walkout wall wallet walnut wander wane want war ward wardrobe warehouse warfare warm
warming warmth warn warning warp warrant warrior warship wary was wash waste watch watchdog water watercolor waterfall
waterfront waterproof waterway watt wave wax way we weak weakness wealth wealthy weapon wear weary weather weathering
weave web website wedding weed week weekday weekend weekly weeknight weigh weight weird welcome welder welfare well
wellbeing wellness went wept were west western wet wetland wetlands whale wharf what whatever wheat wheel wheelchair
when whenever where whether which while whim whip whirlwind whisper whistle whistleblower white who whole wholesale
wholesome whom whopping whose why wicked wide widen widespread widow width wield wife wild wilderness wildfire
wildflower wildlife will willing willow win wind windfall windfarm windmill window windshield windy wine wing wink
winner winter wintry wipe wire wireless wisdom wise wish with withdraw withdrawal wither withheld withhold within
without withstand witness witty wizard wobble woe woke wolf wolves woman women won wonder wonderful wood woodcarver
wooden woodland woodwork woolen word wore work workaround workbook worker workforce workout workplace workshop world
worldwide worm worn worry worse worst worth worthwhile worthy would wound wove woven wow wrangle wrap wrath wreak
wreath wreck wreckage wrestle wrestler wrinkle write writer written wrong wrongful wrote xenophobic yacht yank yard
yeah year yearbook yearn yearning yeast yellow yes yesterday yet yield yoga yogurt yolk you young younger youngest
your yourself youth youthful yummy zeal zealous zero zest zip zone zoo zoom zucchini
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
aaron abbott adams adele airbus alabama alaska alfred alibaba alice allen america amy anders anderson andrea angela
angeles anna arabia argentina arizona armstrong asia athens atlanta auckland austin avon baker bally banks barack
barclays barnes barry becker beijing benny bernie betty beyonce biles billie billy blackberry blackrock blackwell
blakely bloomberg bluetooth bobby boeing bollywood booker brady brandy britain broadway brooklyn brooks browning burns
butler cambridge canon carly carroll carson carter casey chandler charles charlie chernobyl chevrolet chongqing
clinton cody cole collins connor conrail cooper corning crosby cummings daley dallas danny dawson decker denver diana
dixon donald donny downing edison edmund ellie eric facebook fisher fleming fletcher foster fowler francaise francis
frankie franklin freddie frederick freeman fujitsu fuller gardner garland gates giles gina goldberg goldman goodyear
greenland greenpeace guinness hailey halliburton harding harper harrison harry hastings hawkins hayes helen henry
hilary hillary hitachi holden holly hollywood honda hooper hopkins huawei hyundai iceland india ireland irving jackie
jackson jamie jardine jared jenner jennings jenny jerry jimmy jones jordan joyce kardashian keller kelly kenny kerry
kidder kitty landon larry lebron lester lily lincoln lockheed london lotus lynch manning marino markle marley marlon
martens martin mary mason mastercard mazda mcdonald mcgregor melamed mercer messi miller milner mohammed molly moody
morris moscow moses mueller muhammad murphy nanjing naomi nelson netflix netherlands newcastle newman newton nikon
nintendo nissan nolan norfolk northampton northwestern oakland oliver olympus osaka owen owens pacers packers
panasonic parker parsons paterson perry peter peters pickens pickering pitt playstation porter portland potter proctor
rawlings raymond redmond reese reeves regan reilly richards richie ricky riley robby robert roberts robin rockefeller
roger rogers romney ronaldo ronan rosie ross rover sally samsung sanders sandy saunders sawyer scotland sealy sega
serena shelby shelton simon simone skinner slater snapchat snyder sony southampton spears spencer spielberg springer
springfield staley stanley starbucks steinbeck sterling stewart stirling subaru sydney tanner taylor tencent timothy
tina tom tony toshiba townsend toyota tracy trent trowbridge tucker turner tyler venus wagner walgreens walker waller
wallis walter walters warner warren washington waters watson weaver webb webber weber webster wendy wesley wheeler
whitehall whitney wilder wilfred willie willis wilson windows winifred winston woodbridge woods wordpress wyatt xiaomi
"""

# Words for the people and things of a country, and the country: either makes the other known.
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
    """What in a content makes a word for a country or its people known: `swiss` -> {`switzerland`}, and back."""
    known: dict[str, set[str]] = {}
    for entry in _DEMONYMS.split():
        word, _, places = entry.partition(":")
        for place in places.split(","):
            known.setdefault(word, set()).add(place)
            known.setdefault(place, set()).add(word)
    return {word: frozenset(others) for word, others in known.items()}

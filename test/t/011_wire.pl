# What goes over the wire and comes back: bodies, receipts, problem documents.
use strict;
use warnings;
use utf8;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use Compress::Zlib ();
use JSON::PP ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmTransport;
use Test::More;

module_or_skip();

my $node = PostgreSQL::Test::Cluster->new('wire');
$node->init(extra => [ '--encoding=UTF8', '--locale=C' ]);
$node->start;
create_functions($node, 'postgres');
foreach my $encoding ('LATIN1', 'SQL_ASCII')
{
	my $db = lc $encoding;
	$node->safe_psql('postgres',
		"CREATE DATABASE $db ENCODING '$encoding' LOCALE 'C' TEMPLATE template0");
	create_functions($node, $db);
}

my $json = JSON::PP->new->utf8;

# SQL goes to the server as bytes of this encoding, results come back so.
sub query
{
	my ($db, $sql) = @_;
	utf8::encode($sql) if utf8::is_utf8($sql);
	my $result = $node->safe_psql($db, "SET client_encoding = 'UTF8';\n$sql");
	utf8::decode($result);
	return $result;
}

# The query that gives one event; members are SQL expressions.
sub event
{
	my (%e) = @_;
	my %defaults = (
		seq         => '42::bigint',
		id          => "'01890a5d-ac96-774b-bcce-b302099a8057'::uuid",
		op          => "'i'",
		entity_type => "'sale'",
		entity_id   => "'7'",
		branch_id   => "'12'",
		created_at  => "'2025-03-01 10:00:00.5-06'::timestamptz",
		reason      => "'Venta de mostrador'",
		actor       => "'pos'",
		payload     => q('{"new":{"id":7}}'),
		resolution  => 'NULL::text');
	%e = (%defaults, %e);
	return 'SELECT ' . join(', ', map { "$e{$_} AS $_" } sort keys %e);
}

sub body_of
{
	my ($db, $events, $args) = @_;
	$args //= '';
	my $hex = query($db, "SELECT encode(body, 'hex') FROM wire_body(\$q\$$events\$q\$ $args)");
	return pack('H*', $hex);
}

sub errors_of
{
	my ($db, $events) = @_;
	return query($db, "SELECT nevents, errors FROM wire_body(\$q\$$events\$q\$)");
}

# ---- bodies ----

is( body_of('postgres', event()),
	'[{"specversion":"1.0","id":"01890a5d-ac96-774b-bcce-b302099a8057",'
	  . '"source":"/branches/12","type":"softmobile.sale.insert","subject":"7",'
	  . '"time":"2025-03-01T16:00:00.500000Z","datacontenttype":"application/json",'
	  . '"sequence":"42","lane":"high","epoch":"00000000-0000-4000-8000-000000000001",'
	  . '"epochno":"1","reason":"Venta de mostrador","actor":"pos","data":{"new":{"id":7}}}]',
	'an event, byte for byte');

is(body_of('postgres', event() . ' WHERE false'), '[]', 'no event at all');

{
	my $both = event(op => "'u'") . ' UNION ALL '
	  . event(op => "'d'", reason => 'NULL::text', actor => "'a\"b\\c'", resolution => "'local'");
	my $batch = $json->decode(body_of('postgres', $both, ", lane => 'low', epoch_no => 3"));
	is_deeply([ map { $_->{type} } @$batch ], [ 'softmobile.sale.update', 'softmobile.sale.delete' ],
		'two events, update and delete');
	ok(!exists $batch->[1]{reason}, 'no reason, no member');
	is($batch->[1]{actor}, 'a"b\\c', 'JSON escapes in an attribute');
	is($batch->[1]{resolution}, 'local', 'resolution');
	ok(!exists $batch->[0]{resolution}, 'no resolution, no member');
	is($batch->[0]{lane}, 'low', 'lane');
	is($batch->[0]{epochno}, '3', 'ordinal of the epoch');
}

{
	my $text = body_of('postgres', event(
			branch_id   => "E'Nº 5/a b\"%\\\\'",
			entity_type => "E'nota\\té\"'",
			entity_id   => "E'\\x01\\n€'"));
	my $e = $json->decode($text)->[0];
	is($e->{source}, '/branches/N%C2%BA%205%2Fa%20b%22%25%5C', 'a branch id is one path segment');
	is($e->{type}, "softmobile.nota\té\".insert", 'type is escaped for JSON');
	is($e->{subject}, "\x01\n€", 'subject is escaped for JSON');
	is(body_of('postgres', event(branch_id => "'a-._~!\$&''()*+,;=:\@z'")) =~ /"source":"([^"]*)"/ ? $1 : '',
		q(/branches/a-._~!$&'()*+,;=:@z), 'characters of a path stay');
}

{
	my $changing = join(' UNION ALL ', map { event(branch_id => "'$_'") } qw(a b b a));
	is_deeply([ map { $_->{source} } @{ $json->decode(body_of('postgres', $changing)) } ],
		[ map { "/branches/$_" } qw(a b b a) ], 'events of several branches in one body');
}

foreach my $case (
	[ "'infinity'",                            'infinity' ],
	[ "'-infinity'",                           '-infinity' ],
	[ "'12025-01-01 00:00:00+00'",             'the year 12025' ],
	[ "'0044-03-15 00:00:00+00 BC'",           'the year 44 BC' ])
{
	like(errors_of('postgres', event(created_at => "$case->[0]::timestamptz") . ' UNION ALL ' . event()),
		qr/^1\|\{"time cannot be sent/, "refused, and the next one is sent: $case->[1]");
}
is($json->decode(body_of('postgres', event(created_at => "'2025-06-30 23:59:59.000001+00'::timestamptz")))
	  ->[0]{time}, '2025-06-30T23:59:59.000001Z', 'microseconds');

like(errors_of('postgres', event(entity_id => "repeat('x', 1024 * 1024 + 1)")),
	qr/^0\|\{"subject cannot be sent/, 'an attribute beyond all measure is refused');

# gzip: the same bytes, smaller
{
	my $many = 'SELECT g::bigint AS seq, gen_random_uuid() AS id, e.op, e.entity_type, g::text AS entity_id,'
	  . ' e.branch_id, e.created_at, e.reason, e.actor, e.payload, e.resolution'
	  . ' FROM (' . event() . ') e, generate_series(1, 3000) g';
	my ($hex, $raw, $n, $encoding) = split(/\|/, query('postgres',
			"SELECT encode(body, 'hex'), raw_len, nevents, encoding FROM wire_body(\$q\$$many\$q\$, 6)"));
	my $packed = pack('H*', $hex);
	my $plain = Compress::Zlib::memGunzip($packed);
	is($encoding, 'gzip', 'Content-Encoding');
	is(length($plain), $raw, 'length before compression is known');
	cmp_ok(length($packed), '<', $raw / 5, 'compressed');
	my $batch = $json->decode($plain);
	is(scalar(@$batch), 3000, 'all events are there');
	is_deeply([ map { $_->{sequence} } @$batch ], [ 1 .. 3000 ], 'in order');
	is(Compress::Zlib::memGunzip(body_of('postgres', event() . ' WHERE false', ', 6')), '[]',
		'an empty body compressed');
	my $refused = event(created_at => "'infinity'::timestamptz") . ' UNION ALL ' . event();
	is(Compress::Zlib::memGunzip(body_of('postgres', $refused, ', 6')), body_of('postgres', event()),
		'a refused event leaves nothing behind, compressed');
	is(body_of('postgres', $refused), body_of('postgres', event()),
		'a refused event leaves nothing behind, plain');
}

# ---- other encodings ----

is( $json->decode(body_of('latin1',
			event(reason => "'Devolución año'", payload => q('{"new":{"n":"ñ"}}'), branch_id => "'ñ'")))->[0]{reason},
	'Devolución año', 'LATIN1: attributes become UTF-8');
is($json->decode(body_of('latin1', event(payload => q('{"new":{"n":"ñ"}}'))))->[0]{data}{new}{n},
	'ñ', 'LATIN1: data becomes UTF-8');
is($json->decode(body_of('latin1', event(branch_id => "'ñ'")))->[0]{source},
	'/branches/%C3%B1', 'LATIN1: the source is percent-encoded UTF-8');
is($json->decode(body_of('sql_ascii', event(reason => "'Devolución'")))->[0]{reason},
	'Devolución', 'SQL_ASCII: valid UTF-8 goes');
foreach my $case ([ reason => 'reason' ], [ entity_id => 'subject' ], [ entity_type => 'type' ], [ branch_id => 'branch_id' ], [ actor => 'actor' ])
{
	like(
		errors_of('sql_ascii', event($case->[0] => "E'a\\xff'") . ' UNION ALL ' . event()),
		qr/^1\|\{"$case->[1] cannot be sent/, "SQL_ASCII: invalid bytes in $case->[0] are refused");
}
like(errors_of('sql_ascii', event(payload => "E'{\"new\":\"\\xe9\"}'") . ' UNION ALL ' . event()),
	qr/^1\|\{"data cannot be sent/, 'SQL_ASCII: invalid bytes in data are refused');

# ---- receipts ----

my @ids = map { sprintf('01890a5d-ac96-774b-bcce-%012d', $_) } 1 .. 4;

sub receipt
{
	my ($body, $n, $db) = @_;
	$n //= 4;
	utf8::encode($body) if utf8::is_utf8($body);
	my $ids = join(',', @ids[ 0 .. $n - 1 ]);
	return query($db // 'postgres',
		"SELECT ok, accepted, duplicates, error, verdicts FROM wire_receipt('\\x" . unpack('H*', $body)
		  . "', '{$ids}')");
}

is(receipt('{"accepted":4,"duplicates":0,"results":[]}'), 't|4|0||', 'a plain receipt');
is(receipt(' {"x":[{}],"results":[],"duplicates":3,"accepted":1,"y":null}'), 't|1|3||',
	'duplicates, order and members unknown to us');
is( receipt(
		'{"accepted":1,"duplicates":1,"results":['
		  . "{\"id\":\"$ids[3]\",\"status\":\"conflict\",\"detail\":\"differs\",\"current\":{\"b\": 2, \"a\":[1,null]}},"
		  . '{"id":"' . uc($ids[1]) . '","status":"rejected","why":"x"}]}'),
	't|1|1||{"3 conflict <differs> {\"a\": [1, null], \"b\": 2}","1 rejected <> -"}',
	'a conflict and a rejection');
is(receipt("{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"conflict\",\"current\":\"text\"}]}"),
	't|3|0||{"0 conflict <> \"text\""}', 'current may be anything');
is(receipt("{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"conflict\",\"current\":null,\"detail\":7}]}"),
	't|3|0||{"0 conflict <> null"}', 'current may be null, a detail that is no text is none');
is(receipt("{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"rejected\","
		  . '"detail":"  a\u0001\n\tb\u007fc\u009b31m ñ  "}]}'),
	't|3|0||{"0 rejected <  a b c 31m ñ> -"}', 'control characters do not come through');
is(query('postgres', "SELECT char_length(substring(verdicts[1] from '<(.*)>')) FROM wire_receipt(convert_to("
		  . "'{\"accepted\":0,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"rejected\",\"detail\":\"'"
		  . " || repeat('ñ', 100000) || '\"}]}', 'UTF8'), '{$ids[0]}')"),
	'500', 'a long detail is cut at 500 characters');
is(receipt("{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"rejected\",\"detail\":\"a\\u0000b\\ud800c\"}]}"),
	't|3|0||{"0 rejected <a?b?c> -"}', 'escapes that no text can hold become question marks');

my $one = "{\"id\":\"$ids[0]\",\"status\":\"rejected\"}";
my $foreign = '{"id":"01890a5d-ac96-774b-bcce-b302099a8057","status":"rejected"}';
foreach my $case (
	[ '',                                                      'the body is empty' ],
	[ '<html>Please log in</html>',                            'the body is not JSON' ],
	[ '{"accepted":4,"duplicates":0,"resul',                   'the body is not JSON' ],
	[ '{"accepted":4,"duplicates":0,"results":[]} x',          'the body is not JSON' ],
	[ "\xff\xfe",                                              'the body is not UTF-8' ],
	[ "{\"accepted\":4,\0\"duplicates\":0}",                   'the body is not UTF-8' ],
	[ '[]',                                                    'the body is not a JSON object' ],
	[ '4',                                                     'the body is not a JSON object' ],
	[ 'null',                                                  'the body is not a JSON object' ],
	[ '{"status":"ok"}',                                       'accepted is not a count' ],
	[ '{"accepted":4,"results":[]}',                           'duplicates is not a count' ],
	[ '{"accepted":4,"duplicates":0}',                         'results is not an array' ],
	[ '{"accepted":4,"duplicates":0,"results":{}}',            'results is not an array' ],
	[ '{"accepted":4,"duplicates":0,"results":null}',          'results is not an array' ],
	[ '{"accepted":4,"duplicates":0,"results":"[]"}',          'results is not an array' ],
	[ '{"accepted":-1,"duplicates":5,"results":[]}',           'accepted is not a count' ],
	[ '{"accepted":3.5,"duplicates":0.5,"results":[]}',        'accepted is not a count' ],
	[ '{"accepted":"4","duplicates":0,"results":[]}',          'accepted is not a count' ],
	[ '{"accepted":1e400,"duplicates":0,"results":[]}',        'accepted is not a count' ],
	[ '{"accepted":1e999999,"duplicates":0,"results":[]}',     'the body is not JSON' ],
	[ '{"accepted":4294967300,"duplicates":0,"results":[]}',   'accepted is not a count' ],
	[ '{"accepted":999999999,"duplicates":999999999,"results":[]}', 'the counts do not add up to the batch' ],
	[ '{"accepted":3,"duplicates":0,"results":[]}',            'the counts do not add up to the batch' ],
	[ "{\"accepted\":4,\"duplicates\":0,\"results\":[$one]}",  'the counts do not add up to the batch' ],
	[ "{\"accepted\":2,\"duplicates\":0,\"results\":[$one,$one]}", 'results name an event twice' ],
	[ "{\"accepted\":3,\"duplicates\":0,\"results\":[$foreign]}", 'results name an event that is not in the batch' ],
	[ '{"accepted":3,"duplicates":0,"results":[7]}',           'an element of results is not an object' ],
	[ '{"accepted":3,"duplicates":0,"results":[[]]}',          'an element of results is not an object' ],
	[ '{"accepted":3,"duplicates":0,"results":[{}]}',          'an element of results has no id' ],
	[ '{"accepted":3,"duplicates":0,"results":[{"id":7}]}',    'an element of results has no id' ],
	[ '{"accepted":3,"duplicates":0,"results":[{"id":"{01890a5d-ac96-774b-bcce-00000000000"}]}', 'an element of results has no id' ],
	[ "{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\"}]}", 'results have an unknown status' ],
	[ "{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"accepted\"}]}", 'results have an unknown status' ],
	[ '{"accepted":4,"duplicates":0,"results":[],"x":' . ('[' x 101) . (']' x 101) . '}', 'the body is nested too deeply' ],
	[ '[' x 300000,                                            'the body is nested too deeply' ],
	[ '{"a":' x 50000,                                         'the body is nested too deeply' ],
	[ '{"\u00"}":1,"accepted":4,"duplicates":0,"results":[]}', 'the body is not JSON' ],
	[ '{"x":"\\',                                              'the body is not JSON' ],
	[ '{"x":"\u0000',                                          'the body is not JSON' ])
{
	my ($body, $error) = @$case;
	my $shown = length($body) > 70 ? substr($body, 0, 67) . '...' : $body;
	$shown =~ s/[^\x20-\x7e]/?/g;
	is(receipt($body), "f|0|0|no receipt: $error|", "no receipt: $shown");
}
is(receipt('{"accepted":4,"duplicates":0,"results":[],"x":' . ('[' x 99) . (']' x 99) . '}'),
	't|4|0||', 'nested as deeply as allowed');
is(receipt('{"accepted":4,"duplicates":0,"results":[],"x":"' . ('[\\"' x 200) . '"}'),
	't|4|0||', 'brackets in a text are no nesting');

# the transaction and the session go on after a document that the parser refuses
is( query('postgres', 'BEGIN; SELECT count(*) FROM generate_series(1, 2000) g, '
		  . q[wire_receipt(convert_to('{"accepted":' || g, 'UTF8'), '{}') r WHERE NOT r.ok; COMMIT; SELECT 'alive']),
	"2000\nalive", 'refused documents leave nothing behind');

# Documents with some bytes changed, and cut somewhere.  (spoil() takes the row's
# number, else the function scan would run once for all of them.)
{
	my $spoilt = query('postgres', qq[SELECT setseed(0.25);
	CREATE FUNCTION spoil(b bytea, g int) RETURNS bytea LANGUAGE plpgsql AS \$\$
	BEGIN
		FOR i IN 1 .. (random() * 3)::int LOOP
			b := set_byte(b, (random() * (length(b) - 1))::int, (random() * 127)::int);
		END LOOP;
		RETURN CASE WHEN random() < 0.1 THEN substr(b, 1, (random() * length(b))::int) ELSE b END;
	END \$\$;
	SELECT coalesce(nullif(r.error, ''), 'valid') AS outcome FROM generate_series(1, 10000) g,
	wire_receipt(spoil(convert_to(
	'{"accepted":0,"duplicates":0,"results":[{"id":"$ids[0]","status":"conflict","detail":"\\u00f1ñ","current":{"a":[1.5,null,"x"]}}]}',
	'UTF8'), g), '{$ids[0]}') r]);
	my %seen;
	$seen{$_}++ foreach grep { $_ ne '' } split(/\n/, $spoilt);
	my $n = 0;
	$n += $_ foreach values %seen;
	is($n, 10000, 'spoilt receipts raise no error');
	cmp_ok(scalar(keys %seen), '>', 8, 'and are refused for many reasons') or note explain \%seen;
}

# a big batch, everything rejected
is( query('postgres', q[WITH ids AS (SELECT array_agg(gen_random_uuid()) AS a FROM generate_series(1, 20000)),
	body AS (SELECT convert_to('{"accepted":0,"duplicates":0,"results":[' || string_agg('{"id":"' || id || '","status":"rejected"}', ',' ORDER BY id) || ']}', 'UTF8') AS b FROM ids, unnest(a) id)
	SELECT r.ok, cardinality(r.verdicts), (SELECT count(DISTINCT split_part(v, ' ', 1)) FROM unnest(r.verdicts) v) FROM ids, body, wire_receipt(b, a) r]),
	't|20000|20000', '20,000 rejections find their events');

# other encodings
is(receipt("{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"conflict\",\"detail\":\"año € \\u20ac \\u00f1\",\"current\":{\"n\":\"ñ€\"}}]}", 4, 'latin1'),
	't|3|0||{"0 conflict <año ? ? ?> {\"n\": \"ñ?\"}"}', 'LATIN1: what it cannot hold becomes a question mark');
is(receipt("{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"conflict\",\"detail\":\"año \\u00f1\"}]}", 4, 'latin1'),
	't|3|0||{"0 conflict <año ñ> -"}', 'LATIN1: what it can hold stays');
is(receipt("{\"accepted\":3,\"duplicates\":0,\"results\":[{\"id\":\"$ids[0]\",\"status\":\"conflict\",\"detail\":\"año \\u00f1\"}]}", 4, 'sql_ascii'),
	't|3|0||{"0 conflict <año ?> -"}', 'SQL_ASCII: bytes stay, escapes become question marks');

# ---- problem documents ----

sub problem
{
	my ($body, $type) = @_;
	utf8::encode($body) if utf8::is_utf8($body);
	return query('postgres', "SELECT coalesce(wire_problem('\\x" . unpack('H*', $body) . "', " . literal($type) . "), '(none)')");
}
my $type = 'application/problem+json';
is(problem('{"title":"Bad","detail":"el precio es\nnegativo"}', $type), 'el precio es negativo', 'detail');
is(problem('{"title":"Bad","detail":null}', "Application/Problem+JSON; charset=utf-8"), 'Bad', 'else title');
is(problem('{"detail":"no token"}', 'application/json'), 'no token', 'plain JSON too');
is(problem('{"detail":""}', $type), '(none)', 'an empty detail is none');
is(problem('{"detail":[1]}', $type), '(none)', 'a detail that is no text is none');
is(problem('{"detail":"x"}', 'text/html'), '(none)', 'no media type of JSON');
is(problem('{"detail":"x"}', 'application/jsonx'), '(none)', 'a media type that only begins like JSON');
is(problem('{"detail":"x"}', undef), '(none)', 'no media type');
is(problem('<html>', $type), '(none)', 'no JSON');
is(problem('', $type), '(none)', 'no body');

# ---- headers ----

my $trace = "'\\x0123456789abcdef0123456789abcdef'";
like(query('postgres', "SELECT wire_traceparent($trace)"),
	qr/^00-0123456789abcdef0123456789abcdef-[0-9a-f]{16}-01$/, 'traceparent');
is(query('postgres', "SELECT count(DISTINCT wire_traceparent($trace)) FROM generate_series(1, 100)"),
	'100', 'a new parent id each time');

sub key { my ($events, $args) = @_; return query('postgres', "SELECT wire_key(\$q\$$events\$q\$" . ($args // '') . ')'); }
my $key = key(event());
like($key, qr/^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/, 'a key is a UUID of version 8');
is(key(event(reason => "'another'")), $key, 'same members, same key');
isnt(key(event(seq => '43::bigint')), $key, 'another number, another key');
isnt(key(event(id => "'01890a5d-ac96-774b-bcce-b302099a8058'::uuid")), $key, 'another event, another key');
isnt(key(event(resolution => "'local'")), $key, 'a resolution changes the key');
isnt(key(event() . ' UNION ALL ' . event(seq => '43::bigint')), $key, 'one more event, another key');
isnt(key(event(), ", lane => 'low'"), $key, 'another lane, another key');

$node->stop;
done_testing();

# A branch's questions through the gateway: verify, reconcile, reference data; and
# what is refused.

use strict;
use warnings;
use utf8;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IO::Compress::Gzip qw(gzip);
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = start_central();
my $gateway = start_gateway('--max-body', '20MB', '--max-unpacked', '20MB', '--timeout', 5);
my $token = token('b1');
my $epoch = event(1)->{epoch};

# A question as JSON; headers replace or add to the usual ones.
sub ask
{
	my ($path, $question, %headers) = @_;
	return request($gateway, 'POST', $path, ref $question ? encode_json($question) : $question, 'content-type' => 'application/json', %headers);
}

# GET with a token.
sub fetch
{
	my ($path, %headers) = @_;
	my $http = HTTP::Tiny->new(timeout => $PostgreSQL::Test::Utils::timeout_default, keep_alive => 0);

	%headers = (authorization => "Bearer $token", %headers);
	delete $headers{$_} for grep { !defined $headers{$_} } keys %headers;
	return $http->request(delete $headers{method} // 'GET', "http://127.0.0.1:$gateway->{port}$path", { headers => \%headers });
}

sub is_answer
{
	my ($response, $expected, $name) = @_;
	my $answer = eval { decode_json($response->{content}) };

	is_deeply([ $response->{status}, $response->{headers}{'content-type'}, $answer ], [ 200, 'application/json', $expected ], $name)
	  or diag $response->{content};
	return $answer;
}

# ---------------------------------------------------------------------------
# Verify

my @sent = map { event($_, reason => "Devolución $_") } 1, 2, 4;
is_receipt(post($gateway, batch(@sent)), 3, 0, 'a branch sends');
my $lane = { epoch => $epoch, epoch_no => 10, lane => 'high', highest => 4, void => '{[3,4)}' };
my $known = { epoch => $epoch, epoch_no => 10, lane => 'high', highest => 4, received => '{[1,3),[4,5)}', void => '{[3,4)}', forks => 0 };
my $block = { epoch => $epoch, lane => 'high', from => 1, to => 4097, first_id => $sent[0]{id}, last_id => $sent[2]{id} };
is_answer(ask('/verify', { branch => 'b1', lanes => [$lane] }), { branch => 'b1', lanes => [$known], contents => [], events => [] }, 'and verifies');
is($node->safe_psql('postgres', q{SELECT void FROM softmobile.central_lanes}), '{[3,4)}', 'what it declares void is stored');

# The digests, computed by other means.
my @digests = map {
	substr $node->safe_psql('postgres', sprintf 'SELECT encode(sha256(convert_to(concat_ws(E\'\n\', \'%s\', \'sale\', \'%s\', \'insert\', \'\', \'%s\', (SELECT data FROM softmobile.central_inbox WHERE id = \'%1$s\')), \'UTF8\')), \'hex\')',
		$_->{id}, $_->{subject}, $_->{reason}), 0, 32
} @sent;
my $digest = $node->safe_psql('postgres', sprintf 'SELECT encode(sha256(\'%s\'), \'hex\')', join '', @digests);
my $same = { %$block, members => '{[1,3),[4,5)}', digest => $digest };
my $other = { %$block, members => '{[1,5)}', digest => $digest };
is_answer(ask('/central/verify', { branch => 'b1', contents => [ $same, $other ], events => [ { %$block, from => 2 } ] }),
	{
		branch => 'b1', lanes => [$known],
		contents => [ { epoch => $epoch, lane => 'high', from => 1, to => 4097, members => '{[1,3),[4,5)}', digest => $digest } ],
		events => [ { epoch => $epoch, lane => 'high', from => 2, to => 4097, ids => [ map { $_->{id} } @sent[ 1, 2 ] ], seqs => [ 2, 4 ], digests => [ @digests[ 1, 2 ] ] } ]
	}, 'below a path; blocks that differ, and single events');
my $zipped;
my $plain = encode_json({ branch => 'b1', contents => [$same] });
gzip(\$plain => \$zipped);
is_answer(ask('/verify', $zipped, 'content-encoding' => 'gzip'), { branch => 'b1', lanes => [$known], contents => [], events => [] }, 'compressed');

# A batch that is being stored does not wait for digests, nor they for it: only the last step does.
my $release = hold_branch();
my $waiter = in_background(sub { ask('/verify', { branch => 'b1', lanes => [$lane] }) });
wait_until('the question waits', sub { waiting() == 1 });
$release->();
like($waiter->(), qr/^200 /, 'a question waits for a batch of its branch');

# ---------------------------------------------------------------------------
# Reconcile

my $sums = $node->safe_psql('postgres', q{SELECT softmobile.reconcile_bucket('1', 2), softmobile.reconcile_bucket('2', 2), softmobile.reconcile_bucket('4', 2)});
my (@counts, @rows);
for my $at (map { [ (split /\|/, $sums)[$_], $sent[$_]{subject} ] } 0 .. 2)
{
	$counts[ $at->[0] ]++;
	push @{ $rows[ $at->[0] ] }, { entity_id => $at->[1], values => { folio => $at->[1] } };
}
my %comparison = (branch => 'b1', entity_type => 'sale', columns => ['folio'], date_column => undef, buckets => 2, digests => [ ('0' x 16) x 2 ]);
is_answer(ask('/reconcile', { %comparison, counts => [ map { $_ // 0 } @counts[ 0, 1 ] ] }),
	{ branch => 'b1', entity_type => 'sale', rows => 3, buckets => [ map { { bucket => $_, rows => $rows[$_] } } grep { $counts[$_] } 0, 1 ] },
	'reconcile: the rows of buckets that differ');

# ---------------------------------------------------------------------------
# Reference data

is_answer(fetch('/reference?branch=b1'), { resources => [] }, 'nothing is offered');
my $catalogue = qq({ "sku" : "Ñ-1",\n "price":10.50}\n);
utf8::encode($catalogue);
$node->safe_psql('postgres', qq{SELECT softmobile.central_set_reference('catalogue', '$catalogue'); SELECT softmobile.central_set_reference('health', '{"a":1}')});
my $response = fetch('/reference/catalogue?branch=b1');
is($response->{content}, $catalogue, 'the document, byte for byte');
is($response->{headers}{'content-type'}, 'application/json', 'as JSON');
my $listed = decode_json(fetch('/reference?branch=b1')->{content})->{resources}[0];
is_deeply([ @$listed{qw(name bytes digest)} ], [ 'catalogue', length $catalogue, $node->safe_psql('postgres', qq{SELECT encode(sha256(convert_to('$catalogue', 'UTF8')), 'hex')}) ], 'the list');
is(fetch('/some/where/reference/catalogue?branch=b1')->{content}, $catalogue, 'below a path');
is(fetch('/reference/health?branch=b1')->{content}, '{"a":1}', 'a thing may have the name of a route');
$node->safe_psql('postgres', q{SELECT softmobile.central_create_token(E'{"\u00d1u\u00f1oa 2&+"}', 'odd')}) =~ /(\w+)/;
my %odd = (authorization => "Bearer $1");
is(fetch('/reference/catalogue?x=y&branch=%C3%91u%C3%B1oa%202%26%2B', %odd)->{content}, $catalogue, 'a branch in percent-encoding');
is_problem(fetch('/reference/catalogue?branch=%C3%91u%C3%B1oa%202%26+', %odd), 403, 'in which + is a space', qr/2& /);
$response = fetch('/reference/catalogue?branch=b1', method => 'HEAD');
is_deeply([ $response->{status}, $response->{content} // '', $response->{headers}{'content-length'} ], [ 200, '', length $catalogue ], 'HEAD');
is_problem(fetch('/reference/none?branch=b1'), 404, 'a name that there is not', qr/"none"/);
is_problem(fetch('/reference/?branch=b1'), 404, 'no name behind the slash');
is_problem(fetch('/reference/' . 'x' x 5000 . '?branch=b1'), 404, 'an endless name');
is_problem(fetch('/reference/catalogue/x?branch=b1'), 404, 'something behind the name');
is_problem(fetch("/reference/$_?branch=b1"), 400, "a name that is no UTF-8: $_") for '%FF', 'a%C3';
for my $path ('/reference', '/reference/catalogue')
{
	is_problem(fetch($path), 422, "$path: no branch", qr/names no branch/);
	is_problem(fetch("$path?branch"), 422, "$path: no value", qr/names no branch/);
	is_problem(fetch("$path?Branch=b1"), 422, "$path: another parameter");
	is_problem(fetch("$path?branch="), 403, "$path: an empty one");
	is_problem(fetch("$path?branch=b2"), 403, "$path: a foreign branch", qr/"b2"/);
	is_problem(fetch("$path?branch=b2&branch=b1"), 400, "$path: two branches");
	is_problem(fetch("$path?branch=b1%00"), 400, "$path: a zero byte");
	is_problem(fetch("$path?branch=b1%FF"), 400, "$path: no UTF-8");
	is_problem(fetch("$path?branch=b1", authorization => undef), 401, "$path: no token");
	is_problem(fetch("$path?branch=b1", authorization => 'Bearer wrong'), 401, "$path: a wrong token");
	is_problem(request($gateway, 'POST', "$path?branch=b1", '{}'), 405, "$path: POST");
	is(request($gateway, 'DELETE', "$path?branch=b1")->{headers}{allow}, 'GET, HEAD', "$path: DELETE");
}

# ---------------------------------------------------------------------------
# Questions that are refused

for my $path ('/verify', '/reconcile')
{
	is_problem(fetch("$path?branch=b1"), 405, "GET $path");
	is(fetch($path)->{headers}{allow}, 'POST', 'with Allow');
	is(fetch($path, method => 'HEAD')->{status}, 405, "HEAD $path");
	is_problem(ask($path, '{"branch":"b1"}', authorization => undef), 401, "$path without a token");
	is_problem(ask($path, '{"branch":"b1"}', authorization => 'Bearer wrong'), 401, "$path with a wrong token", qr/token is not valid/);
	is_problem(ask($path, '{"branch":"b1"}', authorization => 'Bearer ' . token('b2')), 403, "$path with a foreign token", qr/"b1"/);
	is_problem(ask($path, '{"branch":"b1"}', 'content-type' => 'text/plain'), 415, "$path: another type");
	is_problem(ask($path, ''), 400, "$path: no body");
	is_problem(ask($path, '{"branch":'), 400, "$path: cut off");
	is_problem(ask($path, "{\"branch\":\"b1\"}\0"), 400, "$path: a zero byte");
	is_problem(ask($path, '{"branch":"b1\u0000"}'), 400, "$path: a zero byte in JSON");
	is_problem(ask($path, "{\"branch\":\"\xff\"}"), 400, "$path: no UTF-8");
	is_problem(ask($path, '[' x 100000), 400, "$path: nested without end");
	is_problem(ask($path, '[]'), 422, "$path: no object");
	is_problem(ask($path, '{}'), 422, "$path: no branch");
	is_problem(ask($path, '{"branch":"b2","branch":"b1"}'), 422, "$path: a key that stands twice", qr/twice/);
	is_problem(ask($path, '{"branch":"b1","x":"' . 'x' x 17_000_000 . '"}'), 413, "$path: too long", qr/more than \d+ bytes/);
	is_problem(ask($path, ' ' x 21_000_000), 413, "$path: too long for the gateway", qr/body is too large/);
	my $bomb;
	my $blanks = ' ' x 21_000_000;
	gzip(\$blanks => \$bomb);
	is_problem(ask($path, $bomb, 'content-encoding' => 'gzip'), 413, "$path: too long after decompression");
}
for my $case (
	[ '"lanes":[{"lane":"high","lane":"low"}]' => qr/twice/ ], [ '"lanes":{}' => qr/array/ ], [ '"lanes":[1]' => qr/array of objects/ ],
	map { [ encode_json({ lanes => [ { %$lane, %$_ } ] }) =~ /^\{(.*)\}$/s, qr/cannot be (understood|used)/ ] } { void => '{[5,1)}' }, { void => '{[3,4)' }, { void => '{[1,6)}' }, { void => '{[0,1)}' },
	{ void => '{[1,)}' }, { highest => '99999999999999999999' }, { epoch => 'x' }, { epoch_no => -1 }, { lane => 'urgent' })
{
	my ($members, $why) = @$case;
	is_problem(ask('/verify', "{\"branch\":\"b1\",$members}"), 422, "/verify: $members", $why);
}
is_problem(ask('/verify', { branch => 'b1', contents => [ ($same) x 257 ] }), 413, '/verify: too many blocks', qr/256/);
is_problem(ask('/verify', { branch => 'b1', events => [ { %$block, to => 100_000 } ] }), 413, '/verify: too many numbers', qr/65536/);
my $ranges = '{' . join(',', map { '[' . 2 * $_ . ',' . (2 * $_ + 1) . ')' } 1 .. 250_001) . '}';
is_problem(ask('/verify', { branch => 'b1', lanes => [ { %$lane, highest => 1_000_000, void => $ranges } ] }), 413, '/verify: too many void ranges', qr/250000/);
is_problem(ask('/reconcile', { %comparison, counts => [ 1, 1 ], %$_ }), 422, '/reconcile: ' . encode_json($_), qr/cannot be (understood|answered)/)
  for { buckets => 4097 }, { counts => [1] }, { digests => ['x'] }, { columns => [ 'a', 'a' ] }, { date_column => 'at', from => '2026-02-01', to => '2026-01-31' }, { date_column => 'at', from => 'x' };
is_problem(ask('/reconcile', { %comparison, counts => [ 1, 1 ], date_column => 'folio', from => '2026-01-01', to => '2026-01-31' }), 422, '/reconcile by a column that is no date', qr/"folio".*no date/);
is($node->safe_psql('postgres', q{SELECT received, void FROM softmobile.central_lanes}), '{[1,3),[4,5)}|{[3,4)}', 'nothing of all this was stored');

# A revoked token.
$node->safe_psql('postgres', q{SELECT softmobile.central_revoke_token('b1')});
is_problem(ask($_, '{"branch":"b1"}'), 401, "$_ with a revoked token") for '/verify', '/reconcile';
is_problem(fetch("$_?branch=b1"), 401, "$_ with a revoked token") for '/reference', '/reference/catalogue';

# A thin line gets a long document, though it takes longer than --timeout.
$node->safe_psql('postgres', q{SELECT softmobile.central_set_reference('long', to_json(repeat('x', 12000000)))});
my $impatient = start_gateway('--timeout', 1);
my $line = raw($impatient, "GET /reference/long?branch=b2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " . token('b2') . "\r\nConnection: close\r\n\r\n");
my ($taken, $piece, $from) = (0, '', time);
while ($line->sysread($piece, 65536))
{
	$taken += length $piece;
	sleep 0.02;
}
cmp_ok(time - $from, '>', 3, 'a thin line');
cmp_ok($taken, '>', 12_000_000, 'gets a long document');
is(stop_gateway($impatient), 0, 'and the gateway ends');

# What the gateway's role may not do is no fault of the branch.
$node->safe_psql('postgres', q{REVOKE EXECUTE ON FUNCTION softmobile.central_reference(bytea, text, text) FROM gateway});
is_problem(fetch('/reference?branch=b1'), 500, 'a role without rights', qr/its log says why/);

is(stop_gateway($gateway), 0, 'it ends');
my $log = slurp_file(log_file());
like($log, qr/ 127\.0\.0\.1 GET \/reference\/catalogue 200 /, 'questions are in the log');
unlike($log, qr/$token|branch=|Ñ|Devoluci|sku/, 'with no token, no parameters, no contents');

done_testing();
